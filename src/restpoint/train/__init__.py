"""Train small language models that iterate one block, from text, resumably."""
