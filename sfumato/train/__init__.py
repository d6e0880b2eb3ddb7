"""Floor 4: the one loop and what it trains; knows Family and Trainable only."""
