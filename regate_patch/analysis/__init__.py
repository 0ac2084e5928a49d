"""What a captured graph says: its token axes, where tokens mix, blocks, what cannot be followed; and small changes."""
