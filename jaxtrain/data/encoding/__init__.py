"""Encodes text files of any supported format into token shards. Start at `pipeline.encode`.

input_files lists the files, divide_input makes units of them, readers cut the units into tasks,
workers run documents.encode_pieces on the tasks in several processes, pipeline writes the shards.
"""
