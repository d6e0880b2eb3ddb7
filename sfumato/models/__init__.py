"""Floor 3: what a model is: its record, its nets in files, how they are loaded and saved, and the nets that families
share."""
