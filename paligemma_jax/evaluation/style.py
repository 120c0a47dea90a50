"""How the report looks, by day and by night."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1f2328; --soft: #6a737d; --line: #e4e1db; --accent: #2f6f9f;
  --light: #bcd4e6; --good: #1a7f4b; --bad: #b3362b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #16181b; --card: #1f2226; --ink: #e6e6e3; --soft: #9aa3ad; --line: #33373d;
  --accent: #7db4dc; --light: #35536b; --good: #5cc48d; --bad: #ec8178; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1180px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }}
h1 {{ margin: 0 0 8px; font-size: 26px; overflow-wrap: anywhere; }}
h2 {{ margin: 44px 0 14px; font-size: 19px; }}
h3 {{ margin: 0; font-size: 14px; font-weight: 600; color: var(--soft); }}
dl, p, figure {{ margin: 0; }}
dt, .note, figcaption {{ color: var(--soft); font-size: 13px; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
header dl {{ display: flex; flex-wrap: wrap; gap: 4px 28px; }}
header dl div {{ display: flex; gap: 8px; align-items: baseline; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; margin-top: 28px; }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }}
.value {{ font-size: 40px; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }}
.change {{ margin-top: 4px; font-weight: 600; }}
.change small {{ font-weight: 400; color: var(--soft); }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }} .same {{ color: var(--soft); }}
.histogram {{ display: flex; align-items: flex-end; gap: 2px; height: 44px; margin-top: 12px; }}
.histogram i {{ flex: 1; background: var(--light); border-radius: 2px 2px 0 0; }}
.ends {{ display: flex; justify-content: space-between; border-top: 1px solid var(--line); }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: 6px 12px 6px 0; text-align: left; font-weight: 400; border-bottom: 1px solid var(--line); }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td.bar {{ width: 46%; }}
.bar div {{ position: relative; }}
abbr {{ text-decoration: none; cursor: help; }}
.bar i {{ display: block; height: 14px; background: var(--light); border-radius: 3px; }}
.bar b {{ position: absolute; top: 50%; height: 0; border-top: 2px solid var(--accent); }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px; }}
.cards article {{ padding: 0; overflow: hidden; display: flex; flex-direction: column; }}
.pictures {{ display: flex; gap: 1px; background: var(--line); }}
.pictures figure {{ flex: 1; min-width: 0; background: var(--card); }}
.pictures img {{ display: block; width: 100%; max-height: 300px; object-fit: contain; background: var(--paper); }}
figcaption {{ padding: 3px 0; text-align: center; }}
.cards dl {{ padding: 12px 16px 4px; }}
.cards dl div {{ display: grid; grid-template-columns: 76px 1fr; gap: 8px; padding: 2px 0; max-height: 190px; overflow: auto; }}
.answer dd {{ font-weight: 600; }} .right dd {{ color: var(--good); }} .error dd {{ color: var(--bad); }}
.scores {{ margin-top: auto; padding: 8px 16px 12px; color: var(--soft); font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 16px; }}
.scores b {{ color: var(--ink); }}
</style></head><body>
{body}
</body></html>
"""
