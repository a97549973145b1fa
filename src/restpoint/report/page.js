"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false };
  const ACCENT = "#d9622b", PLAIN = "#3b82c4", TRAIL = 5;

  function template() {
    const [ink, grid, card] = dark.matches ? ["#c6cbd1", "#2c3238", "#1b1f24"] : ["#4a5159", "#e9ebed", "#ffffff"];
    const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickcolor: grid, automargin: true,
      title: { font: { size: 11 }, standoff: 8 } };
    return { layout: {
      paper_bgcolor: card, plot_bgcolor: card, font: { color: ink, size: 12, family: "system-ui, sans-serif" },
      xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink } },
    } };
  }

  function layout(own) {
    const phone = innerWidth < 760;
    return {
      margin: { l: 48, r: 12, t: 8, b: 40 }, hovermode: "closest", dragmode: touch ? false : "zoom",
      legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { size: phone ? 10 : 11 } },
      ...own, template: template(),
    };
  }

  // plotly reads a little HTML in labels: text of the corpus must not be read so.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // What the state after a layer is called.
  const named = (layer) => (data.depths.length ? data.depths[layer] : String(layer));

  const drawn = [];
  const root = document.documentElement;

  function draw(box, figure) {
    Plotly.newPlot(box, figure.data, layout(figure.layout), config);
    drawn.push(box);
    root.dataset.drawn = drawn.length;
  }

  // One chart at a time, so that the page answers while they are made.
  const waiting = [...document.querySelectorAll("[data-chart]")];
  root.dataset.charts = waiting.length + (data.scenes.length ? 1 : 0);
  function next() {
    const box = waiting.shift();
    if (!box) return;
    draw(box, data.charts[box.dataset.chart]);
    setTimeout(next, 0);
  }

  dark.addEventListener("change", () => drawn.forEach((box) => Plotly.relayout(box, { template: template() })));

  if (data.scenes.length) scenes();
  next();

  function scenes() {
    const box = document.getElementById("chart-trajectories");
    const pick = document.getElementById("scene"), slider = document.getElementById("layer");
    const play = document.getElementById("play"), shown = document.getElementById("layer-shown");
    const table = document.getElementById("prediction-table"), sentence = document.getElementById("sentence");
    let scene = data.scenes[0], timer = 0;

    function traces(layer) {
      const trail = { x: [], y: [] }, dots = { x: [], y: [], text: [], hover: [], colour: [], line: [] };
      scene.tokens.forEach((token, at) => {
        for (let l = Math.max(0, layer - TRAIL); l <= layer; l++) {
          trail.x.push(scene.plane[l][at][0]);
          trail.y.push(scene.plane[l][at][1]);
        }
        trail.x.push(null);
        trail.y.push(null);
        const settled = scene.settled[at] <= layer;
        dots.x.push(scene.plane[layer][at][0]);
        dots.y.push(scene.plane[layer][at][1]);
        dots.text.push(plain(token));
        dots.hover.push(plain(token) + " → " + plain(scene.words[scene.predicted[layer][at]])
          + "<br>probability " + scene.probability[layer][at] + ", length " + scene.norms[layer][at]
          + (settled ? "<br>settled at " + (data.depths.length ? "" : "layer ") + named(scene.settled[at]) : ""));
        dots.colour.push(settled ? ACCENT : "rgba(0,0,0,0)");
        dots.line.push(settled ? ACCENT : PLAIN);
      });
      return [
        { type: "scatter", mode: "lines", x: trail.x, y: trail.y, line: { width: 1, color: "#7f8c8d77" }, hoverinfo: "skip" },
        { type: "scatter", mode: "markers+text", x: dots.x, y: dots.y, text: dots.text, textposition: "top center",
          textfont: { size: 11 }, hovertext: dots.hover, hoverinfo: "text", cliponaxis: false,
          marker: { size: 9, color: dots.colour, line: { width: 1.8, color: dots.line } } },
      ];
    }

    // The same frame for every layer, so that what moves are the tokens.
    function frame() {
      const ends = [0, 1].map((axis) => {
        const values = scene.plane.flat().map((point) => point[axis]).filter((value) => value !== null);
        const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
        const margin = 0.08 * (high - low) || 0.1;
        return [low - margin, high + margin];
      });
      return {
        showlegend: false, uirevision: scene.text,
        xaxis: { title: { text: "first principal direction (of states of length 1)" }, range: ends[0] },
        yaxis: { title: { text: "second principal direction" }, range: ends[1], scaleanchor: "x" },
      };
    }

    function show() {
      const layer = +slider.value;
      shown.value = data.depths.length ? named(layer) : layer + " of " + slider.max;
      slider.setAttribute("aria-valuetext", (data.depths.length ? "" : "layer ") + named(layer));
      if (drawn.includes(box)) Plotly.react(box, traces(layer), layout(frame()), config);
      else draw(box, { data: traces(layer), layout: frame() });
      for (const head of table.querySelectorAll("thead th")) head.classList.toggle("now", head.dataset.layer === slider.value);
    }

    function cell(row, kind, text, scope) {
      const made = row.appendChild(document.createElement(kind));
      const words = made.appendChild(document.createElement("bdi"));
      words.textContent = text;
      if (scope) made.scope = scope;
      return made;
    }

    function fill() {
      sentence.textContent = scene.text;
      table.querySelectorAll("thead, tbody").forEach((part) => part.remove());
      const head = table.createTHead().insertRow(), body = table.createTBody();
      cell(head, "th", data.depths.length ? "token \\ state" : "token \\ layer", "col");
      scene.plane.forEach((_, layer) => { cell(head, "th", named(layer), "col").dataset.layer = layer; });
      scene.tokens.forEach((token, at) => {
        const row = body.insertRow();
        cell(row, "th", token, "row").title = token;
        scene.predicted.forEach((words, layer) => {
          const made = cell(row, "td", scene.words[words[at]]);
          const probability = scene.probability[layer][at], entropy = scene.entropy[layer][at];
          made.style.setProperty("--p", probability ?? 0);
          made.title = scene.words[words[at]] + ": probability " + probability + ", entropy " + entropy + " nats";
          if (scene.settled[at] === layer) {
            made.classList.add("settled");
            made.title += "; settled here";
            made.setAttribute("aria-label", made.title);
          }
        });
      });
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
    }

    pick.addEventListener("change", () => {
      scene = data.scenes[+pick.value];
      slider.max = scene.plane.length - 1;
      fill();
      show();
    });
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (+slider.value >= +slider.max) slider.value = 0;
      play.textContent = "Pause";
      play.setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        if (+slider.value >= +slider.max) return stop();
        slider.value = +slider.value + 1;
        show();
      }, calm.matches ? 1200 : 450);
    });
    slider.max = scene.plane.length - 1;
    fill();
    show();
  }
})();
