"""The atlas of a model to look at: one offline page, tables and pictures."""
