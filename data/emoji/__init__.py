"""A corpus of pictures of a colour emoji font: hundreds of named things on coloured grounds, with captions."""
