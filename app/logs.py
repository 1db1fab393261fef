"""Logs: one JSON object a line on standard error, from structlog and from the standard library alike."""

import logging
import sys
from typing import Any, cast

import structlog

_SHARED: list[Any] = [
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def setup(level: str) -> None:
    """Send every logger of this process through one JSON formatter. level: debug, info, warning or error."""
    drop_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED, processors=[drop_meta, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose methods take an event name and facts as keywords; it writes to the standard library's."""
    wrap = structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    wrapped = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, *_SHARED, wrap],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return cast(structlog.stdlib.BoundLogger, wrapped)
