"""Runs jobs on several hosts over SSH: started by the operator, supervised on each host.

The operator's side and `launch.host` use only the standard library, so neither needs JAX.
"""
