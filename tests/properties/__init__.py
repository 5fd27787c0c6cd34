"""Properties: examples drawn by hypothesis, each right by an independent formula, or refused by a named error."""
