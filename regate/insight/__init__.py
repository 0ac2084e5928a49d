"""What gating can gain before training, and what it did after."""
