"""The code that runs on the hosts: sent over SSH as source. Linux, standard library only."""
