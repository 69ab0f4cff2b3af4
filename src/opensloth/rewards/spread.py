"""A reward with a spread in every group, whatever the model writes: for `os-train verify`, which needs gradients.

No name of `--rewards`: it is loaded as a file, as a user's own would be, and means nothing.
"""


def spread(completions: list[object], completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of odd token ids, and a little for the length."""
    return [sum(token % 2 for token in ids) / len(ids) + len(ids) / 100 for ids in completion_ids]
