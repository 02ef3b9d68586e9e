"""Which sample comes when, and where its pixels are read."""
