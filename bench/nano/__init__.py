"""The tasks of the bundled model: their words, generators, dialogues and scores."""
