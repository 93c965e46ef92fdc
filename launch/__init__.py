"""Multi-host jobs over SSH: started from the operator's machine, kept by a supervisor on each host.

The operator's side and `launch.host` are standard library only, so neither needs JAX installed.
"""
