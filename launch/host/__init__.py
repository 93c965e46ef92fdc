"""The code that runs on the hosts: sent over SSH as source. Standard library only, Linux only."""
