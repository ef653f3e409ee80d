"""Durations as text."""


def duration_text(seconds: float) -> str:
    """A duration in its two largest units.

    >>> duration_text(42.3), duration_text(150), duration_text(11_100)
    ('42 s', '2 min 30 s', '3 h 05 min')
    """
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_seconds:02d} s" if minutes else f"{whole_seconds} s"
