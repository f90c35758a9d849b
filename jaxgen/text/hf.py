"""What is used of transformers as it is: imported when it is asked for, and without its advice to install torch."""

import logging
from typing import Any


def transformers() -> Any:
    """The package; importing it takes seconds, and nothing but text needs it."""
    logger = logging.getLogger("transformers")
    logger.addFilter(_says_something_else)
    try:
        import transformers

        return transformers
    finally:
        logger.removeFilter(_says_something_else)


def _says_something_else(record: logging.LogRecord) -> bool:
    """Whether a message is not the one that without PyTorch there are no models: here there are."""
    return not record.getMessage().startswith("PyTorch was not found")
