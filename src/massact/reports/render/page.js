"use strict";
(() => {
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // Figures -----------------------------------------------------------------------------------------------------
  // A copy of a figure in which names of colours (under keys that are colours) are what light or dark has for them.
  function painted(value, key = "") {
    if (Array.isArray(value)) return value.map((v) => painted(v, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
    if (key === "colorscale") return [0, 1, 2, 3].map((i) => [i / 3, color("--heat" + i)]);
    return /color$/.test(key) && typeof value === "string" && value.startsWith("--") ? color(value) : value;
  }

  // For a wall all that is drawn grows, and a figure is as wide as a slide.
  const lecture = root.dataset.style === "lecture", GROWTH = 1.7, GROWS = ["size", "width", "thickness", "standoff", "l", "r", "t", "b"];
  function grown(value, key = "") {
    if (!lecture) return value;
    if (Array.isArray(value)) return value.map((v) => (typeof v === "object" ? grown(v) : v));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, grown(v, k)]));
    return typeof value === "number" && GROWS.includes(key) ? GROWTH * value : value;
  }

  // Where there is no room for the title of an axis it breaks behind a semicolon (not that of an entity).
  function axis(given, quiet, narrow) {
    const title = { ...(given || {}).title };
    if (narrow && title.text) title.text = title.text.replace(/(?<!&[#\w]+); /g, ";<br>");
    return {
      gridcolor: color("--grid"), zerolinecolor: color("--rule"), linecolor: color("--rule"), automargin: true,
      ...quiet, ...given, title: { font: { size: 12 }, standoff: 8, ...title },
    };
  }

  function layoutOf(figure) {
    const given = painted(figure.spec.layout), scene = given.scene;
    if (figure.linear) {
      const { range, tickmode, tickvals, ticktext, ...rest } = given.yaxis;
      given.yaxis = { ...rest, type: "linear", rangemode: "tozero" };
      given.annotations = (given.annotations || []).map((a) => (a.yref === "y" ? { ...a, y: 10 ** a.y } : a));
    }
    const named = figure.spec.data.filter((t) => t.name).length > 1 && given.showlegend !== false;
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: figure.spec.height, autosize: true,
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: color("--ink") },
      margin: { l: 52, r: 12, t: touch ? 8 : 30, b: named ? 64 : 44 }, showlegend: named, bargap: 0.28,
      legend: { orientation: "h", y: -0.2, yanchor: "top", x: 0, font: { size: 12 } },
      hoverlabel: { bgcolor: color("--paper"), bordercolor: color("--rule"), font: { color: color("--ink"), size: 12 } },
      dragmode: touch ? false : "zoom",
    };
    if (scene) {
      const side = { gridcolor: color("--grid"), zerolinecolor: color("--rule"), color: color("--muted"),
        showbackground: false, showspikes: false };
      for (const name of ["xaxis", "yaxis", "zaxis"]) scene[name] = { ...side, ...scene[name] };
      // On a narrow page the camera stands further off: all three sides stay within the picture.
      const { eye } = scene.camera, far = Math.max(1, Math.min(1.6, 600 / (figure.plot.clientWidth || 600)));
      scene.camera = { ...scene.camera, eye: { x: eye.x * far, y: eye.y * far, z: eye.z * far } };
      const sliders = (given.sliders || []).map((slider) => ({ ...slider, pad: { l: 40, r: 40, t: 8, b: 12 }, bgcolor: color("--rule"),
        activebgcolor: color("--accent"), bordercolor: color("--rule"), font: { size: 12, color: color("--ink") } }));
      return { ...base, margin: { l: 0, r: 0, t: touch ? 0 : 30, b: 0 }, scene, sliders, showlegend: false };
    }
    return { ...base, ...given, showlegend: named, xaxis: axis(given.xaxis, {}, figure.plot.clientWidth < 480), yaxis: axis(given.yaxis) };
  }

  const touch = matchMedia("(pointer: coarse)").matches;
  const config = (figure) => ({ responsive: true, displaylogo: false, scrollZoom: false, displayModeBar: touch ? false : "hover",
    modeBarButtons: [figure.spec.layout.scene ? ["toImage", "orbitRotation", "pan3d", "resetCameraDefault3d"]
      : ["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { format: figure.spec.layout.scene ? "png" : "svg", filename: figure.element.id, scale: 2 } });
  const figures = all("figure").filter((element) => element.querySelector("script")).map((element) => ({
    element, plot: element.querySelector(".plot"), drawn: false, linear: false,
    spec: JSON.parse(element.querySelector("script").textContent),
  }));

  function draw(figure) {
    figure.drawn = true;
    const layout = { ...grown(layoutOf(figure)), ...(lecture ? { height: Math.round((figure.plot.clientWidth * 9) / 16) } : {}) };
    return window.Plotly.react(figure.plot, grown(painted(figure.spec.data)), layout, config(figure));
  }
  const redraw = () => figures.filter((f) => f.drawn).map(draw);

  if (window.Plotly) {
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const figure = figures.find((f) => f.element === entry.target);
        if (entry.isIntersecting && !figure.drawn) draw(figure);
      }
    }, { rootMargin: "800px 0px" });
    figures.forEach((f) => near.observe(f.element));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", () => { root.dataset.print = ""; figures.forEach(draw); });
    addEventListener("afterprint", () => { delete root.dataset.print; redraw(); });
    for (const figure of figures)
      figure.element.querySelector(".scale")?.addEventListener("click", (event) => {
        figure.linear = !figure.linear;
        event.target.textContent = figure.linear ? "Log scale" : "Linear scale";
        event.target.setAttribute("aria-pressed", String(figure.linear));
        draw(figure);
      });
  }

  // Strips of text ----------------------------------------------------------------------------------------------
  const spelled = (v) => v.toLocaleString("en-US", { maximumSignificantDigits: 4 });

  const channels = (name) => color(name).match(/[\da-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const light = (rgb) => rgb.map((v) => ((v / 255 + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);

  const TURN = 0.179;  // on lighter grounds black stands out more than white: both are 4.58 to 1 there

  function strip(box) {
    const given = JSON.parse(box.querySelector("script").textContent);
    const [point, layer, told, ramp] = ["select", "input", ".told", ".ramp"].map((s) => box.querySelector(s));
    const tokens = all(".tokens", box).flatMap((line, text) => all("span", line).map((element) => ({ element, text })));
    const here = (kind) => given[kind][point.value][layer.value];
    let at = 0;
    point.value = box.dataset.point;

    // What is unavailable has no colour of the scale.
    function paint() {
      const known = given.values[point.value].flat().filter((v) => v).map(Math.abs), values = here("values");
      const low = known.reduce((a, v) => Math.min(a, v), Infinity), high = known.reduce((a, v) => Math.max(a, v), 0);
      const heat = [0, 1, 2, 3].map((i) => channels("--heat" + i));
      tokens.forEach(({ element }, i) => {
        const size = Math.abs(values[i] || 0), level = size && high > low ? (3 * Math.log(size / low)) / Math.log(high / low) : 0;
        const step = Math.min(2, Math.floor(level)), mixed = heat[step].map((v, k) => v + (level - step) * (heat[step + 1][k] - v));
        element.classList.toggle("na", values[i] === null);
        element.style.background = values[i] === null ? "none" : `rgb(${mixed.map(Math.round).join(" ")})`;
        element.style.color = values[i] === null ? "" : light(mixed) > TURN ? "#000" : "#fff";
      });
      box.querySelector("output").textContent = given.layers[layer.value];
      ramp.textContent = known.length ? `|h| from ${spelled(low)} to ${spelled(high)}, log scale` : "unavailable here";
      tell(at);
    }

    function tell(i) {
      tokens[at].element.tabIndex = -1;
      tokens[at].element.classList.remove("at");
      at = i;
      const { element, text } = tokens[i], value = here("values")[i], median = here("medians")[text];
      element.tabIndex = 0;
      element.classList.add("at");
      const ratio = median ? `, ${spelled(Math.abs(value) / median)} times the median ${spelled(median)}` : "";
      const said = `dim ${here("dims")[i]} is ${value < 0 ? "\u2212" : "+"}${spelled(Math.abs(value))}${ratio}`;
      told.textContent = `Position ${element.dataset.p}, \u201c\u2068${element.textContent}\u2069\u201d: ${value === null ? "unavailable" : said}`;
    }

    tokens.forEach(({ element }, i) => ["pointerenter", "focus"].forEach((name) => element.addEventListener(name, () => tell(i))));
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
      if (!step || !event.target.closest(".tokens")) return;
      event.preventDefault();
      tokens[Math.min(tokens.length - 1, Math.max(0, at + step))].element.focus();
    });
    [point, layer].forEach((control) => control.addEventListener("input", paint));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
  }
  all(".strip").forEach(strip);

  // Tables ------------------------------------------------------------------------------------------------------
  const valueOf = (cell) => cell.dataset.v ?? cell.textContent;

  function compare(a, b) {
    const [x, y] = [a, b].map((v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : v === "" ? NaN : Number(v)));
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y || 0;
    return a.localeCompare(b);
  }

  function sort(head) {
    const table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
    const next = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    all("thead th", table).forEach((th) => th.setAttribute("aria-sort", th === head ? next : "none"));
    const rows = [...body.rows].map((row) => [row, valueOf(row.cells[place])]);
    const missing = (row) => row.cells[place].classList.contains("na");
    rows.sort(([r, a], [s, b]) => missing(r) - missing(s) || (next === "ascending" ? 1 : -1) * compare(a, b));
    body.append(...rows.map(([row]) => row));
  }

  async function copy(text, button) {
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = said; }, 1500);
  }

  const quoted = (text) => (/[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
  const csv = (table, every) => [
    all("thead th", table).map((th) => th.dataset.name),
    ...[...table.tBodies[0].rows].filter((row) => every || !row.hidden).map((row) => [...row.cells].map(valueOf)),
  ].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";

  // A table of the run as it is, packed beside what is shown of it; of any other all rows that are shown.
  async function save(box, name) {
    const packed = box.querySelector(".whole")?.textContent;
    const bytes = packed ? Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)) : csv(box.querySelector("table"), true);
    const all = packed ? new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")) : bytes;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await new Response(all, { headers: { "Content-Type": "text/csv" } }).blob());
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.parentElement.matches("thead th")) sort(button.parentElement);
    if (button.matches(".csv")) copy(csv(button.closest(".table").querySelector("table")), button);
    if (button.matches(".save")) save(button.closest(".table"), button.dataset.name);
    if (button.matches(".copy")) copy(button.closest("details").querySelector("code").textContent, button);
  });
  document.addEventListener("input", (event) => {
    if (!event.target.matches(".table .tools input")) return;
    const box = event.target.closest(".table"), wanted = event.target.value.toLowerCase();
    const rows = [...box.querySelector("table").tBodies[0].rows];
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    const left = rows.filter((row) => !row.hidden).length;
    box.querySelector(".told").textContent = wanted ? `${left} of ${rows.length} rows` : "";
  });
})();
