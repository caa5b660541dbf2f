"""The frame of every page: its policy, style and title. It loads nothing from elsewhere."""

import base64
import hashlib

from largescale.monitoring.run_words import date
from largescale.page.charts import STYLES
from largescale.page.markup import text
from largescale.page.style import REFRESH, SHARES, STYLE

DOCTYPE = "<!doctype html>"


def frame(title: str, content: str, made_unix_s: float, refresh_s: float | None = None) -> str:
    """A whole page. `refresh_s`: it is served, and asks for itself again after so many seconds."""
    script = ""
    allowed = "default-src 'none';style-src 'unsafe-inline';img-src data:"
    if refresh_s:
        script = REFRESH.replace("EVERY", str(round(1e3 * refresh_s)))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f";script-src 'sha256-{digest}';connect-src 'self'"
        script = f"<script>{script}</script>"
        script += f'<noscript><meta http-equiv="refresh" content="{refresh_s:g}"></noscript>'
    lines = "".join(
        f".line.s{i}{{stroke:var(--s{i})}}.range.s{i},circle.s{i}{{fill:var(--s{i})}}"
        for i in range(STYLES)
    ) + "".join(f".k{i}{{fill:var(--k{i})}}" for i in range(SHARES))
    return (
        f'{DOCTYPE}<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE.replace('LINES', lines)}</style></head><body>"
        f'<a class="skip" href="#content">to the content</a><header><h1>{text(title)}</h1>'
        f'<p class="trouble" id="lost" role="status"></p></header><main id="content">'
        f'<p class="soft">made {date(made_unix_s)}</p>{content}</main>{script}'
        "</body></html>\n"
    )
