"""A number and its report: each module is a script that measures one task."""
