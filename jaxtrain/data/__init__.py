"""Text and token shards in, batches on the device mesh out.

`encode` turns text into token shards, `corpus` opens and checks the shards of a split, `loader`
makes batches of them.
"""
