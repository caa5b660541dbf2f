"""How the page looks, and the one script of a page that is served."""

# Styles of shares of a bar, --k0 and so on; of lines there are `charts.STYLES`.
SHARES = 9
# Light and dark, narrow and printed; no colour is named outside.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--soft:#5b646d;--line:#d5dae0;--card:#f5f7f9;
--b0:#eef2f6;--b1:#dfe6ee;--off:#e3e7ec;--on:#1f6fb4;--bad:#b3261e;
--s0:#1f6fb4;--s1:#b8480f;--s2:#23803a;--s3:#8247b5;
--s4:#8d6608;--s5:#0b7f86;--s6:#b52c72;--s7:#5b646d;
--k0:#2b7fc4;--k1:#d98c1f;--k2:#8247b5;--k3:#2f9e75;--k4:#c4b33a;
--k5:#8a97a5;--k6:#c2362b;--k7:#d5dae0;--k8:#6e5a4e}
@media (prefers-color-scheme:dark){
:root{--bg:#14171a;--fg:#e4e8ec;--soft:#9aa5b0;--line:#353c44;--card:#1d2226;
--b0:#1b2025;--b1:#262d34;--off:#2a3138;--on:#5aa9e6;--bad:#ff8a80;
--s0:#5aa9e6;--s1:#f0955c;--s2:#6cc483;--s3:#c39bec;
--s4:#d9b64a;--s5:#56c7cd;--s6:#f083b5;--s7:#a6b0ba;
--k0:#4a9bdc;--k1:#e0a04a;--k2:#a678d6;--k3:#4fbf95;--k4:#d6c75a;
--k5:#75818d;--k6:#e8645a;--k7:#3b434b;--k8:#a08a7c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
main,header{max-width:1320px;margin:0 auto;padding:0 16px}
h1{font-size:1.5rem;margin:20px 0 4px}h2{font-size:1.3rem;margin:36px 0 8px;overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:28px 0 8px;border-bottom:1px solid var(--line);padding-bottom:4px}
p{margin:6px 0}a{color:var(--on)}nav a{margin-right:14px;display:inline-block}
.note,.soft{color:var(--soft);font-size:.85rem}.trouble{color:var(--bad)}
progress{width:100%;height:12px;accent-color:var(--on)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,168px),1fr));gap:8px;
  margin:10px 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:6px 10px;
  min-width:0}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));
  gap:16px 20px}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:2px}
figure>svg{display:block;width:100%;height:auto}figure>img{display:block;max-width:100%;height:auto}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}svg text.small{font-size:10px}
.axis,.tick,.rule{stroke:var(--line);fill:none;vector-effect:non-scaling-stroke}
.axis,.tick{stroke:var(--soft)}
.b0{fill:var(--b0)}.b1{fill:var(--b1)}.off{fill:var(--off)}.on{fill:var(--on)}
.edge{stroke:var(--bg);stroke-width:1;vector-effect:non-scaling-stroke}
.mark{stroke:var(--bad);stroke-width:1.5;vector-effect:non-scaling-stroke}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.range{opacity:.35;stroke:none}
LINES
.line.s1{stroke-dasharray:7 3}.line.s2{stroke-dasharray:2 2}.line.s3{stroke-dasharray:9 3 2 3}
.line.s5{stroke-dasharray:7 3}.line.s6{stroke-dasharray:2 2}.line.s7{stroke-dasharray:9 3 2 3}
image,.scale img{image-rendering:pixelated}
.scale{display:flex;gap:8px;align-items:center;font-size:.8rem;color:var(--soft)}
.scale img{width:120px;height:10px}
.bar{width:100%;height:16px;min-width:160px;display:block}figure>svg.bar{height:22px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0;padding:0;
  font-size:.82rem}
.legend svg{width:24px;height:10px;margin-right:5px}
.scroll{overflow-x:auto;margin:6px 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:2px 0}
th,td{text-align:left;padding:3px 12px 3px 0;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}
td.long{white-space:normal;min-width:24ch;max-width:64ch;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft);font-size:.85rem;padding:3px 0}
pre{overflow:auto;max-height:60vh;background:var(--card);border:1px solid var(--line);padding:10px;
  font-size:.8rem}
.strip{list-style:none;display:flex;gap:10px;overflow-x:auto;margin:0;padding:0 0 8px}
.strip li{flex:0 0 auto;font-size:.8rem;color:var(--soft)}
.strip img{display:block;max-width:280px;height:auto}
:focus-visible{outline:2px solid var(--on);outline-offset:2px}
.skip{position:absolute;left:-999px}.skip:focus{left:8px;top:8px;background:var(--bg);padding:6px}
@media print{
:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#444;--line:#bbb;--card:#fff;
--b0:#f2f4f7;--b1:#e2e7ee;--off:#e3e7ec;--on:#1f6fb4;--bad:#b3261e;
--s0:#1f6fb4;--s1:#b8480f;--s2:#23803a;--s3:#8247b5;
--s4:#8d6608;--s5:#0b7f86;--s6:#b52c72;--s7:#5b646d;
--k0:#2b7fc4;--k1:#d98c1f;--k2:#8247b5;--k3:#2f9e75;--k4:#c4b33a;
--k5:#8a97a5;--k6:#c2362b;--k7:#d5dae0;--k8:#6e5a4e}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
nav,details:not(.printed),.skip{display:none}
details::details-content{content-visibility:visible;height:auto}
pre{max-height:none;white-space:pre-wrap;font-size:8.5px}
.strip{flex-wrap:wrap}
.scroll{overflow:visible}
body{font-size:11px}
td{white-space:normal}table,.note,.legend{font-size:10px}
.grid{grid-template-columns:1fr 1fr}tr,.strip li,.cards div{break-inside:avoid}
nav~article{break-before:page}h2,h3,caption,thead{break-after:avoid}}
"""
# Of a page that is served: takes its place, but for what is open, in focus and scrolled.
REFRESH = """
const key=d=>(d.closest('article')||document.body).id+'|'+
(d.parentNode.firstChild.textContent||'')+'|'+d.firstChild.textContent;
async function refresh(){try{
const answer=await fetch(location.pathname,{cache:'no-store'});if(!answer.ok)throw 0;
const next=new DOMParser().parseFromString(await answer.text(),'text/html').querySelector('main');
const main=document.querySelector('main');
const open=new Set([...main.querySelectorAll('details[open]')].map(key));
if(String(getSelection()))return;
const able='summary,a,.scroll,.strip,pre';
const focused=[...main.querySelectorAll(able)].indexOf(document.activeElement);
for(const d of next.querySelectorAll('details'))d.open=open.has(key(d));
const left=[...main.querySelectorAll('.scroll,.strip,pre')].map(e=>e.scrollLeft);
main.replaceWith(next);
[...next.querySelectorAll('.scroll,.strip,pre')].forEach((e,i)=>{e.scrollLeft=left[i]||0});
if(focused>=0)next.querySelectorAll(able)[focused]?.focus({preventScroll:true});
document.getElementById('lost').textContent='';
}catch(e){document.getElementById('lost').textContent=
'No newer page is to be had; this one shows how the runs stood.'}
finally{setTimeout(refresh,EVERY)}}
setTimeout(refresh,EVERY);
"""
