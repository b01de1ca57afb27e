"""A reward of -1 or 0 that cannot grade about every seventh response: by its text, so that every run agrees."""


def score(response: str, answer: str, finished: bool) -> float | None:
    digest = sum(map(ord, response)) % 14
    if digest == 3:
        raise ValueError("this response is not to be graded")
    return None if digest == 10 else float(finished and response.strip() == answer) - 1.0
