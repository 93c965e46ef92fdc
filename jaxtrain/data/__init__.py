"""Token shards and text in, batches on the mesh out; see corpus, loader and encode."""
