"use strict";
(() => {
  // Okabe and Ito's colours, in an order and a lightness that keep their contrast on each ground. "meta" of a trace
  // says what it is painted with: slot, a colour of these; soft, the text's soft colour; scale, from ground to full.
  const PALETTES = {
    light: {
      slots: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"],
      text: "#1a1d21", soft: "#6b737c", line: "#d5dae0", panel: "#ffffff",
      scale: [[0, "#f7fbff"], [0.5, "#6baed6"], [1, "#08306b"]],
    },
    dark: {
      slots: ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#FFFFFF"],
      text: "#e8eaed", soft: "#a7b0ba", line: "#39414b", panel: "#1e2329",
      scale: [[0, "#1e2329"], [0.5, "#2f77b4"], [1, "#cfe8ff"]],
    },
  };
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)");
  const clone = (value) => JSON.parse(JSON.stringify(value));

  const faint = (colour) =>
    `rgba(${[1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).join(",")},0.2)`;

  function painted(trace, palette) {
    const meta = trace.meta || {};
    if (meta.scale) {
      trace.colorscale = palette.scale;
      trace.colorbar = { ...trace.colorbar, outlinewidth: 0 };
      return trace;
    }
    const colour = meta.soft ? palette.soft : palette.slots[(meta.slot || 0) % palette.slots.length];
    if (meta.band) {
      trace.fillcolor = faint(colour);
      trace.line = { ...trace.line, color: faint(colour) };
      return trace;
    }
    trace.line = trace.type === "bar" ? undefined : { ...trace.line, color: colour };
    trace.marker = { ...trace.marker, color: colour };
    if (trace.type === "bar") {
      trace.marker.line = { color: palette.panel, width: 1 };
      if (trace.marker.pattern) trace.marker.pattern = { ...trace.marker.pattern, fgcolor: palette.panel };
    }
    if (trace.error_x) trace.error_x.color = colour;
    if (trace.error_y) trace.error_y.color = colour;
    return trace;
  }

  function laidOut(layout, palette, width) {
    const axis = (given) => ({
      automargin: true, gridcolor: palette.line, linecolor: palette.line, zerolinecolor: palette.line, ...given,
    });
    const made = {
      margin: { l: 8, r: 8, t: 8, b: 8 },
      hovermode: "closest",
      dragmode: touch.matches ? false : "zoom", // a finger that scrolls the page must not zoom a chart
      ...layout,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: palette.text },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: palette.panel, bordercolor: palette.line, font: { color: palette.text } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", ...layout.legend },
      width,
    };
    for (const name of Object.keys(made)) if (/^[xy]axis\d*$/.test(name)) made[name] = axis(made[name]);
    return made;
  }

  function draw() {
    const palette = PALETTES[dark.matches ? "dark" : "light"];
    for (const place of document.querySelectorAll("[data-chart]")) {
      const { data, layout } = clone(charts[place.dataset.chart]);
      const width = Math.floor(place.getBoundingClientRect().width);
      Plotly.react(place, data.map((trace) => painted(trace, palette)), laidOut(layout, palette, width), {
        displayModeBar: false, showTips: false, doubleClick: "reset",
      });
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  let waiting = 0;
  let last = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === last) return; // a phone's address bar changes the height alone
    last = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 100);
  });
  dark.addEventListener("change", draw);
  draw();
})();
