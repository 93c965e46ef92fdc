"""What runs on the hosts: sent over SSH as one archive, standard library only, Linux."""
