"""Checks against an implementation that shares no code with ours."""
