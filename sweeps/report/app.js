"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const AXES = { tokens: "tokens (slots)", flops: "FLOPs", hours: "hours of training" };
  // Okabe and Ito (2008), "Color Universal Design"; its black is the baseline's, its yellow comes last.
  const HUES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#C9B800"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "2px 7px"];
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star"];
  const MANY = 12; // arms; of more, those with the lowest loss are drawn at first

  // Of this page alone, and by name: the next one may have other arms, in another order.
  const memory = `report ${location.pathname}`;
  const state = Object.assign({ axis: "tokens", logx: false, logy: false, smooth: 0, hidden: null, theme: null }, remembered());
  function remembered() {
    try { return data.reload ? JSON.parse(sessionStorage.getItem(memory) || "{}") : {}; } catch { return {}; }
  }
  function remember() {
    try { sessionStorage.setItem(memory, JSON.stringify({ ...state, hidden: [...state.hidden].map((arm) => data.arms[arm].name) })); } catch { /* a page from the disk may not */ }
  }

  const runsOf = data.arms.map((_, arm) => data.runs.filter((run) => run.arm === arm));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  // A mean only over all seeds of an arm: never over what happens to be there.
  const finalOf = (arm) => {
    const finals = runsOf[arm].map((run) => run.final);
    return data.arms[arm].whole && finals.length && finals.every((value) => value !== null) ? mean(finals) : null;
  };
  const styles = [];
  for (const arm of data.arms) {
    const place = styles.filter((style) => !style.baseline).length;
    styles.push(arm.baseline
      ? { baseline: true, hue: null, dash: "solid", marker: "circle" }
      : { hue: HUES[place % HUES.length], dash: DASHES[Math.floor(place / HUES.length) % DASHES.length], marker: MARKERS[Math.floor(place / HUES.length) % MARKERS.length] });
  }
  function firstHidden() {
    if (data.arms.length <= MANY) return new Set();
    const order = data.arms.map((_, arm) => arm).filter((arm) => !data.arms[arm].baseline).sort((one, other) => (finalOf(one) ?? Infinity) - (finalOf(other) ?? Infinity));
    const kept = new Set(order.slice(0, 7));
    return new Set(data.arms.map((_, arm) => arm).filter((arm) => !kept.has(arm) && !data.arms[arm].baseline));
  }
  state.hidden = state.hidden ? new Set([...data.arms.keys()].filter((arm) => state.hidden.includes(data.arms[arm].name))) : firstHidden();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const hue = (arm) => styles[arm].hue ?? css("--ink");
  const transparent = (colour, alpha) => {
    const number = parseInt(colour.slice(1), 16);
    return `rgba(${number >> 16}, ${(number >> 8) & 255}, ${number & 255}, ${alpha})`;
  };

  // Points of a run: {x, y} without gaps, smoothed.
  function points(run, key, axis, smooth) {
    const group = run.groups.find((each) => key in each.y);
    if (!group) return null;
    const x = [], y = [];
    group.y[key].forEach((value, place) => {
      if (value !== null && group.x[axis][place] !== null) { x.push(group.x[axis][place]); y.push(value); }
    });
    if (smooth > 0 && group.x.tokens.length > 2) {
      let sum = 0, weight = 0;
      for (let place = 0; place < y.length; place++) {
        sum = sum * smooth + y[place] * (1 - smooth);
        weight = weight * smooth + (1 - smooth);
        y[place] = sum / weight;
      }
    }
    return x.length ? { x, y } : null;
  }
  function interpolate(curve, at) {
    const { x, y } = curve;
    let low = 0, high = x.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] <= at) low = middle; else high = middle; }
    return x[high] === x[low] ? y[high] : y[low] + (y[high] - y[low]) * (at - x[low]) / (x[high] - x[low]);
  }
  // Mean, least and most over seeds, where all of them are known; null where that is nowhere.
  function band(curves) {
    if (curves.some((curve) => !curve.x.length)) return null;
    const same = curves.every((curve) => curve.x.length === curves[0].x.length && curve.x.every((value, place) => value === curves[0].x[place]));
    const low = Math.max(...curves.map((curve) => curve.x[0])), high = Math.min(...curves.map((curve) => curve.x.at(-1)));
    if (low > high) return null;
    const x = same ? curves[0].x : [...Array(120)].map((_, place) => low + (high - low) * place / 119);
    const rows = x.map((at, place) => curves.map((curve) => same ? curve.y[place] : interpolate(curve, at)));
    return { x, mean: rows.map(mean), least: rows.map((row) => Math.min(...row)), most: rows.map((row) => Math.max(...row)) };
  }

  function curves(chart) {
    const traces = [];
    const dots = chart.key === "held_out" || chart.key.startsWith("score ") || chart.key.startsWith("held-out ");
    data.arms.forEach((arm, place) => {
      if (state.hidden.has(place)) return;
      const drawn = runsOf[place].map((run) => ({ run, curve: points(run, chart.key, state.axis, state.smooth) })).filter((each) => each.curve);
      const line = { color: hue(place), dash: styles[place].dash, width: arm.baseline ? 2.4 : 1.7 };
      const marker = { symbol: styles[place].marker, size: 5, color: hue(place) };
      let over = null;
      if (arm.whole && drawn.length > 1 && drawn.length === runsOf[place].length) {
        over = band(drawn.map((each) => each.curve));
      }
      if (over) {
        traces.push(...shade(place, over), { ...meanLine(place, over), mode: dots && over.x.length < 40 ? "lines+markers" : "lines" });
      } else {
        for (const { run, curve } of drawn) {
          const name = data.seeds ? `${arm.name}, seed ${run.seed}` : arm.name;
          traces.push({ x: curve.x, y: curve.y, name, mode: curve.x.length < 2 ? "markers" : dots && curve.x.length < 40 ? "lines+markers" : "lines", line: { ...line, width: 1.2 }, marker, type: "scatter" });
        }
      }
    });
    return traces;
  }
  // Of each seed the difference from the baseline's run of that seed, at the same cost and on the same text.
  function gaps() {
    const base = data.arms.findIndex((arm) => arm.baseline), traces = [];
    data.arms.forEach((arm, place) => {
      if (state.hidden.has(place) || place === base || !arm.whole || !data.arms[base].whole || arm.other_text) return;
      const pairs = runsOf[place].map((run) => [run, runsOf[base].find((other) => other.seed === run.seed)].map((each) => each && points(each, "held_out", state.axis, 0)));
      if (!pairs.length || !pairs.every(([ours, theirs]) => ours && theirs)) return;
      const found = pairs.map(([ours, theirs]) => {
        const low = Math.max(ours.x[0], theirs.x[0]), high = Math.min(ours.x.at(-1), theirs.x.at(-1));
        const x = ours.x.filter((at) => at >= low && at <= high);
        return { x, y: x.map((at) => interpolate(ours, at) - interpolate(theirs, at)) };
      });
      const over = band(found);
      if (!over) return;
      if (pairs.length > 1) traces.push(...shade(place, over));
      traces.push({ ...meanLine(place, over), mode: over.x.length < 40 ? "lines+markers" : "lines" });
    });
    return traces;
  }
  const shade = (place, over) => [{ x: [...over.x, ...over.x.toReversed()], y: [...over.most, ...over.least.toReversed()], fill: "toself", fillcolor: transparent(hue(place), 0.15), line: { width: 0 }, mode: "lines", hoverinfo: "skip", type: "scatter" }];
  const meanLine = (place, over) => ({ over, x: over.x, y: over.mean, name: data.arms[place].name, line: { color: hue(place), dash: styles[place].dash, width: data.arms[place].baseline ? 2.4 : 1.7 }, marker: { symbol: styles[place].marker, size: 5, color: hue(place) }, type: "scatter" });
  // FLOPs say more of what runs cost, where all have the same tokens and their FLOPs are known.
  const costAxis = () => {
    const drawn = data.runs.filter((run) => run.final !== null && (data.arms[run.arm].whole || !data.seeds));
    const same = drawn.every((run) => spent(run, "flops") !== null && spent(run, "tokens") === spent(drawn[0], "tokens"));
    return state.axis === "tokens" && drawn.length && same ? "flops" : state.axis;
  };
  function spent(run, axis) {
    const ends = run.groups.map((group) => group.x[axis].at(-1)).filter((value) => value !== null && value !== undefined);
    return ends.length ? Math.max(...ends) : null;
  }
  function pareto() {
    const found = [], axis = costAxis(), costs = (run) => spent(run, axis);
    data.arms.forEach((arm, place) => {
      if (state.hidden.has(place)) return;
      const runs = runsOf[place].filter((run) => run.final !== null && costs(run) !== null);
      if (arm.whole && runs.length && runs.length === runsOf[place].length) {
        found.push({ place, name: arm.name, x: mean(runs.map(costs)), y: mean(runs.map((run) => run.final)) });
      } else if (!data.seeds) {
        runs.forEach((run) => found.push({ place, name: arm.name, x: costs(run), y: run.final }));
      }
    });
    return found.sort((one, other) => one.x - other.x || one.y - other.y);
  }
  function paretoTraces() {
    const found = pareto(), front = [];
    for (const each of found) if (!front.length || each.y < front.at(-1).y) front.push(each);
    const traces = [{ x: front.map((each) => each.x), y: front.map((each) => each.y), mode: "lines", line: { shape: "hv", color: css("--soft"), width: 1, dash: "dot" }, hoverinfo: "skip", type: "scatter" }];
    for (const each of found) {
      const label = found.length <= MANY;
      traces.push({ x: [each.x], y: [each.y], name: each.name, text: [escaped(each.name)], textposition: "top center", textfont: { size: 11, color: css("--ink") }, mode: label ? "markers+text" : "markers", marker: { color: hue(each.place), symbol: styles[each.place].marker, size: 9 }, type: "scatter", cliponaxis: false });
    }
    return traces;
  }
  function mixture() {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.mixture)))];
    const runs = data.runs.filter((run) => !state.hidden.has(run.arm) && Object.keys(run.mixture).length);
    const labels = runs.map((run) => escaped(data.seeds ? `${data.arms[run.arm].name}, ${run.seed}` : data.arms[run.arm].name));
    const shapes = ["", "/", ".", "x", "-", "\\", "+", "|"];
    return names.map((name, place) => ({ type: "bar", orientation: "h", name, y: labels, x: runs.map((run) => run.mixture[name] ?? 0), marker: { color: HUES[place % HUES.length], line: { width: 0 }, pattern: { shape: shapes[Math.floor(place / HUES.length) % shapes.length] } } }));
  }

  // Plotly reads some HTML in its texts.
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function draw(figure) {
    const chart = data.charts[figure.dataset.chart];
    const bars = chart.key === "mixture", scatter = chart.key === "pareto", gap = chart.key === "gap";
    const traces = bars ? mixture() : scatter ? paretoTraces() : gap ? gaps() : curves(chart);
    for (const trace of traces) {
      if (!trace.name) continue;
      trace.hovertemplate = bars ? "%{y}<br>%{x:.2%}<extra>%{fullData.name}</extra>" : "%{x:.4s}: <b>%{y:.5g}</b><extra>%{fullData.name}</extra>";
      trace.name = escaped(trace.name);
    }
    const axis = { gridcolor: css("--line"), linecolor: css("--soft"), tickcolor: css("--soft"), zeroline: false, ticks: "outside", ticklen: 4, automargin: true };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: bars, legend: { orientation: "h", y: 1.12 }, barmode: "stack",
      font: { family: "system-ui, sans-serif", size: 11.5, color: css("--ink") }, margin: { l: 48, r: 12, t: bars ? 26 : 8, b: 38 }, hovermode: "closest", dragmode: "zoom",
      hoverlabel: { font: { size: 12 } }, uirevision: `${state.axis}${state.logx}${state.logy}`,
      xaxis: { ...axis, title: { text: bars ? "share of tokens" : AXES[scatter ? costAxis() : state.axis], standoff: 6 }, type: state.logx && !bars ? "log" : "linear", tickformat: bars ? ".0%" : "~s", nticks: 7, ...(bars ? { range: [0, 1] } : {}) },
      yaxis: { ...axis, type: bars ? "category" : state.logy && !gap ? "log" : "linear", tickformat: bars ? "" : chart.key === "mfu" ? ".1%" : chart.key === "lr" || chart.key === "speed" ? "~s" : "", ...(bars ? { dtick: 1 } : { nticks: 7 }), ...(gap ? { zeroline: true, zerolinecolor: css("--ink"), zerolinewidth: 1.4 } : {}), ...(bars ? { autorange: "reversed" } : {}) },
    };
    if (!bars && state.axis === "hours") layout.xaxis.tickformat = "~g";
    if (bars) figure.querySelector(".plot").style.height = `${Math.max(140, 90 + 18 * (traces[0]?.y.length ?? 0))}px`;
    Plotly.react(figure.querySelector(".plot"), traces, layout, { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
    figure.dataset.drawn = "1";
    figure.dataset.stale = "";
    const table = figure.querySelector(".under details");
    if (table.open) tabulate(figure);
  }

  // What a picture shows, unsmoothed.
  function rows(chart) {
    if (chart.key === "mixture") {
      return [["arm", "seed", "stream", "share"], ...data.runs.filter((run) => !state.hidden.has(run.arm)).flatMap((run) => Object.entries(run.mixture).map(([name, share]) => [data.arms[run.arm].name, run.seed, name, share]))];
    }
    if (chart.key === "pareto") return [["arm", AXES[costAxis()], "loss"], ...pareto().map((each) => [each.name, each.x, each.y])];
    if (chart.key === "gap") {
      return [["arm", AXES[state.axis], "mean difference", "least", "most"], ...gaps().filter((trace) => trace.name).flatMap((trace) => trace.x.map((at, place) => [trace.name, at, trace.y[place], trace.over.least[place], trace.over.most[place]]))];
    }
    const found = [["arm", "seed", "tokens", "FLOPs", "hours", chart.title]];
    for (const run of data.runs) {
      const group = state.hidden.has(run.arm) ? null : run.groups.find((each) => chart.key in each.y);
      group?.y[chart.key].forEach((value, place) => found.push([data.arms[run.arm].name, run.seed, group.x.tokens[place], group.x.flops[place], group.x.hours[place], value]));
    }
    return found;
  }
  function tabulate(figure) {
    const [head, ...body] = rows(data.charts[figure.dataset.chart]);
    const table = document.createElement("table");
    const line = (parent, tag, cells) => {
      const row = parent.insertRow();
      for (const cell of cells) {
        const made = document.createElement(tag);
        made.textContent = cell === null ? "\u2013" : typeof cell === "number" ? cell.toLocaleString("en", { maximumSignificantDigits: 6 }) : cell;
        if (typeof cell === "number") made.className = "num";
        row.append(made);
      }
    };
    line(table.createTHead(), "th", head);
    const part = table.createTBody();
    for (const row of body) line(part, "td", row);
    figure.querySelector(".under .scroll").replaceChildren(table);
  }
  // RFC 4180; a text that a spreadsheet would take for a formula gets a quote.
  const field = (value) => {
    if (value === null) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+@\t\r]/.test(value) || /^-[^\d.]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  function download(name, table) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([table.map((row) => row.map(field).join(",") + "\r\n").join("")], { type: "text/csv" }));
    link.download = `${name.replace(/[^\w.-]+/g, "-")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.dataset.visible = entry.isIntersecting ? "1" : "";
      if (entry.isIntersecting && (!entry.target.dataset.drawn || entry.target.dataset.stale)) draw(entry.target);
    }
  }, { rootMargin: "200px" });
  function redraw() {
    remember();
    for (const figure of figures) { figure.dataset.stale = "1"; if (figure.dataset.visible) draw(figure); }
  }
  for (const figure of figures) {
    seen.observe(figure);
    figure.querySelector("details").addEventListener("toggle", (event) => event.target.open && tabulate(figure));
    figure.querySelector("button.csv").addEventListener("click", () => { const chart = data.charts[figure.dataset.chart]; download(chart.title, rows(chart)); });
  }

  // Tables of results: sorted by a click or a key on the head; what has no value stays last.
  for (const table of document.querySelectorAll("section.result table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const numeric = head.classList.contains("num");
      const sorted = [...table.tBodies[0].rows].sort((one, other) => {
        const [first, second] = [value(one), value(other)];
        if (first === "" || second === "") return (first === "") - (second === "");
        const order = numeric ? Number(first) - Number(second) : first.localeCompare(second, "en", { numeric: true });
        return rising ? order : -order;
      });
      table.tBodies[0].append(...sorted);
    }));
  }
  for (const button of document.querySelectorAll(".sectionhead button.csv")) {
    button.addEventListener("click", () => {
      const table = $(button.dataset.table);
      // Values, and not what people read: without a value the field is empty.
      const heads = [...table.tHead.rows[0].cells].map((head) => JSON.parse(head.dataset.csv ?? "null") ?? [head.textContent]);
      const numeric = [...table.tHead.rows[0].cells].map((head) => head.classList.contains("num"));
      const values = (cell, column) => {
        if (cell.dataset.csv) return JSON.parse(cell.dataset.csv);
        if (!numeric[column]) return [cell.textContent.trim()];
        return heads[column].map(() => cell.dataset.value === "" ? null : Number(cell.dataset.value));
      };
      const body = [...table.tBodies[0].rows].map((row) => [...row.cells].flatMap(values));
      download(table.id, [heads.flat(), ...body]);
    });
  }

  // Arms: their key, drawn as their lines are, and a box to hide them.
  function key(arm) {
    const image = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, value] of Object.entries({ class: "key", width: 30, height: 10, "aria-hidden": "true" })) image.setAttribute(name, value);
    const line = document.createElementNS(image.namespaceURI, "line");
    const dashes = { solid: "none", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4", longdashdot: "11 3 2 3" };
    const attributes = { x1: 0, x2: 30, y1: 5, y2: 5, "stroke-width": 2.4, stroke: styles[arm].hue ?? "currentColor", "stroke-dasharray": dashes[styles[arm].dash] ?? "2 7" };
    for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
    image.append(line);
    return image;
  }
  const boxes = data.arms.map((arm, place) => {
    const item = document.createElement("li"), label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !state.hidden.has(place);
    box.addEventListener("change", () => { if (box.checked) state.hidden.delete(place); else state.hidden.add(place); count(); redraw(); });
    const note = arm.baseline ? " (baseline)" : arm.stopped ? ` (stopped at ${arm.stopped})` : arm.whole ? (arm.other_text ? " (other held-out text)" : "") : " (incomplete)";
    label.append(box, key(place), arm.name + note);
    item.append(label);
    $("arms").append(item);
    return box;
  });
  const count = () => { $("shown").textContent = `${data.arms.length - state.hidden.size} of ${data.arms.length}`; };
  function setAll(shown) {
    state.hidden = new Set(shown ? [] : data.arms.keys());
    boxes.forEach((box) => { box.checked = shown; });
    count();
    redraw();
  }
  $("all").addEventListener("click", () => setAll(true));
  $("none").addEventListener("click", () => setAll(false));

  for (const name of ["logx", "logy"]) {
    $(name).checked = state[name];
    $(name).addEventListener("change", () => { state[name] = $(name).checked; redraw(); });
  }
  $("axis").value = state.axis;
  $("axis").addEventListener("change", () => { state.axis = $("axis").value; redraw(); });
  $("smooth").value = state.smooth;
  $("smooth").addEventListener("input", () => { state.smooth = Number($("smooth").value); $("smoothness").value = state.smooth; redraw(); });
  $("smoothness").value = state.smooth;

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (state.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  function paint() {
    if (state.theme) document.documentElement.dataset.theme = state.theme;
    $("theme").textContent = isDark() ? "Light" : "Dark";
  }
  $("theme").addEventListener("click", () => { state.theme = isDark() ? "light" : "dark"; paint(); redraw(); });
  dark.addEventListener("change", () => { paint(); redraw(); });
  // Paper is white, and what was never scrolled to is printed, too.
  let before;
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; document.documentElement.dataset.theme = "light"; figures.forEach(draw); });
  addEventListener("afterprint", () => { if (before) document.documentElement.dataset.theme = before; else delete document.documentElement.dataset.theme; figures.forEach(draw); });
  paint();
  count();
  if (data.reload) setInterval(() => { if (!document.hidden) { remember(); location.reload(); } }, data.reload * 1000);
  // The first one at once, wherever it is: it is what is looked at next.
  if (figures.length) draw(figures[0]);
})();
