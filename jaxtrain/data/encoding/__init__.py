"""Encodes text files into token shards: `encoding.pipeline.encode` is the entry point."""
