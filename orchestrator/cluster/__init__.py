"""Ray: connecting to it, placing agents on its nodes, and what lives on every node beside them."""
