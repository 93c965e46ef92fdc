"""Runs jobs on several hosts over SSH: started by the operator, supervised on each host.

Starting and supervising use only the standard library; `launch.report` also uses NumPy, SciPy and
Jinja2. Neither needs JAX.
"""
