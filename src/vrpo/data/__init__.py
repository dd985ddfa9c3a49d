"""From a folder or archive of images to shards on disk, and from shards to batches."""
