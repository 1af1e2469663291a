"""The style sheet of the report's page.

For: :mod:`jaxquant.evaluate.page`. Ten series colours that differ in hue and lightness, for light
and dark; system fonts only, so that nothing is fetched.
"""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1a2028;--soft:#5b6573;--rule:#dfe3e8;--grid:#e9ecf0;
--code:#f0f2f5;--alarm:#fdecea;--alarm-ink:#9b1c1c;
--s0:#0b6bb8;--s1:#d1570a;--s2:#0a8a66;--s3:#b64a94;--s4:#b58500;--s5:#c1272d;--s6:#6a4fb3;
--s7:#7c5a33;--s8:#3fa3db;--s9:#5f6b7a}
@media (prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2028;--ink:#e8ecf1;--soft:#9aa6b4;
--rule:#303945;--grid:#28303a;--code:#242c36;--alarm:#3d1a1a;--alarm-ink:#ffb4ab;
--s0:#5aaef0;--s1:#ff9250;--s2:#3ecf9f;--s3:#ec8ccb;--s4:#e6bd45;--s5:#ff7a7a;--s6:#b39cf5;
--s7:#cfa676;--s8:#8fd3f7;--s9:#aab6c4}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1200px;margin:0 auto;padding:32px 16px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px}h2{font-size:19px;margin:0 0 14px}
h3{font-size:15px;margin:22px 0 8px}h3 small,summary small,li small{
font-weight:400;color:var(--soft)}
header p,.aside{color:var(--soft);margin:0}.aside{font-size:13px;margin:8px 0 0;max-width:80ch}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px 22px;
margin-top:20px}
.alarm{background:var(--alarm);color:var(--alarm-ink);border-radius:10px;padding:10px 22px;
margin-top:20px}
.alarm p{margin:4px 0;font-weight:600}
.wide{overflow-x:auto}.wide svg{min-width:720px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;
vertical-align:top}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;font-size:12.5px}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;padding-left:0}td:last-child,thead th:last-child{padding-right:0}
tbody th{font-weight:600}td small{display:block;white-space:pre;color:var(--soft);font-size:11.5px}
.chip{display:inline-flex;align-items:center;gap:7px}
.chip::before{content:"";width:10px;height:10px;border-radius:50%;background:var(--c);flex:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13.5px;margin-bottom:10px}
.panels{display:grid;gap:8px 14px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--panel)),1fr))}
figure{margin:0}figure h3{margin:8px 0 0}
svg{display:block;width:100%;height:auto;margin:0 auto;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.tick{fill:var(--soft)}.label{fill:var(--soft);font-size:12.5px}.path{fill:var(--ink);font-size:11.5px}
.name{fill:var(--ink);font-weight:600}
.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}
.mark{stroke:var(--soft);stroke-dasharray:4 4;opacity:.7}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}.mote{fill:var(--c);opacity:.9}
.curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.whisker{stroke:var(--c);stroke-width:2;opacity:.55}
details{border-top:1px solid var(--rule);padding:8px 0}details:first-of-type{border-top:0}
summary{cursor:pointer;font-weight:600}
ol{padding-left:26px;margin:8px 0}li p{margin:10px 0 4px}
.context{background:var(--code);border-radius:6px;padding:8px 10px;white-space:pre-wrap;
overflow-wrap:anywhere;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.caret{display:inline-block;width:7px;height:14px;background:var(--s1);vertical-align:-2px;
margin-left:1px}
.change{font-size:13.5px;margin:5px 0 12px}
code{background:var(--code);border-radius:4px;padding:1px 5px;white-space:pre;
font:12.5px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--code);border-radius:6px;padding:10px 12px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:12.5px;margin:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;font-size:13.5px;margin:14px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
ul{padding-left:20px;margin:0;font-size:13.5px}
@media (max-width:640px){section{padding:16px 14px}h1{font-size:23px}}
@media print{body{background:#fff}section{break-inside:avoid;border-color:#ccc}}
"""
