"""The one decode loop, its drafters and its controller: token ids in, token ids out."""
