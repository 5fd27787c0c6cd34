"""A model and videos in, answers out: classes, actions in boxes, answers, search, features."""
