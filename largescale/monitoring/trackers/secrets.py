"""Messages of other libraries, without what nobody may read."""

import os
import re

_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")


def without_secrets(text: str) -> str:
    """The text without passwords in addresses, and without the values of variables that hold keys."""
    text = re.sub(r"://[^/\s@]*@", "://***@", text)
    for name, value in os.environ.items():
        # Short ones are no keys, and would make a text unreadable.
        if _SECRET.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, "***")
    return text
