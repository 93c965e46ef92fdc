"""Reads text or token shards and makes batches of them on the device mesh.

`encode` turns text into token shards, `corpus` opens and checks the shards of a split, `loader`
makes batches of them.
"""
