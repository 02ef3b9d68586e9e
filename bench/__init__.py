"""Each cost beside the stock way of doing the same thing, both in one run: `python -m bench`."""
