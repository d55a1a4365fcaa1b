// Puts charts in the place of pictures, and sorts tables by a click. Without it, the page shows the
// pictures.
"use strict";
(() => {
  const HEIGHT = 260, LEAST_WIDTH = 380, GAP = 16;

  // A number with four digits, and without zeros at its end.
  const digits = (v) => (v == null ? "–" : String(Number(v.toPrecision(4))));

  // The label of a tick; a logarithmic axis has one at its end too, which is no round number.
  const tick = (v, log) => (v == null || (log && Number(v.toPrecision(1)) !== v) ? "" : digits(v));

  // The columns of one panel: each curve, then the two ends of its band.
  function columns(panel) {
    const tables = [], series = [{ label: panel.x_label, value: (u, v) => digits(v) }], bands = [];
    for (const curve of panel.curves) {
      const line = series.length, hasBand = curve.low !== null;
      series.push({
        label: curve.label,
        stroke: curve.colour,
        width: curve.width,
        dash: curve.dash.length ? curve.dash : undefined,
        points: { show: curve.x.length < 2 },
        spanGaps: true,
        ends: hasBand ? [line + 1, line + 2] : [],
        value: (u, v, s, at) => {
          if (at == null || v == null) return digits(v);
          if (!hasBand) return digits(v);
          return `${digits(v)} (${digits(u.data[line + 1][at])} to ${digits(u.data[line + 2][at])})`;
        },
      });
      tables.push([curve.x, curve.y]);
      if (!hasBand) continue;
      for (const end of ["low", "high"]) {
        series.push({
          label: end, class: "end-of-band", stroke: curve.colour + "90", width: 0.8,
          points: { show: false }, spanGaps: true, ends: [],
        });
        tables.push([curve.x, curve[end]]);
      }
      bands.push({ series: [line + 2, line + 1], fill: curve.colour + "1f" });
    }
    return { data: uPlot.join(tables), series, bands };
  }

  function draw(panel, place, width, group) {
    const { data, series, bands } = columns(panel);
    const y = { distr: panel.log ? 3 : 1 };
    if (panel.limits) y.range = (u, low, high) => panel.limits;
    return new uPlot({
      title: panel.title,
      width, height: HEIGHT, series, bands,
      scales: { x: { time: false }, y },
      axes: [
        { label: panel.x_label, labelSize: 22, size: 34 },
        { label: panel.y_label, labelSize: 20, size: 58,
          values: (u, splits) => splits.map((v) => tick(v, panel.log)) },
      ],
      cursor: { sync: { key: group }, drag: { x: true, y: false } },
      legend: { markers: { width: 2 } },
      hooks: {
        setSeries: [(u, at, change) => {
          if (at == null || change.show == null) return;
          for (const end of u.series[at].ends || []) u.setSeries(end, { show: change.show });
        }],
      },
    }, data, place);
  }

  // All panels of a figure, side by side where there is room.
  function show(figure, number) {
    const panels = JSON.parse(figure.querySelector("script").textContent);
    const place = document.createElement("div");
    place.className = "charts";
    figure.prepend(place);
    const width = () => {
      const room = figure.clientWidth;
      const fit = Math.max(1, Math.min(panels.length, Math.floor((room + GAP) / (LEAST_WIDTH + GAP))));
      return Math.floor((room - (fit - 1) * GAP) / fit);
    };
    const charts = panels.map((panel) => draw(panel, place, width(), "figure" + number));
    figure.classList.add("is-live");
    new ResizeObserver(() => {
      for (const chart of charts) {
        if (chart.width !== width()) chart.setSize({ width: width(), height: HEIGHT });
      }
    }).observe(figure);
  }

  // Numbers by size, all else by its letters; what is empty comes last.
  function order(one, other) {
    const [a, b] = [one, other].map((text) => parseFloat(text.replace(/,/g, "")));
    if (!isNaN(a) && !isNaN(b)) return a - b;
    return one.localeCompare(other);
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const text = (row) => row.cells[column].textContent.trim();
        const rows = [...body.rows].sort((one, other) => {
          if (!text(one) || !text(other)) return Boolean(text(other)) - Boolean(text(one));
          return (down ? -1 : 1) * order(text(one), text(other));
        });
        body.append(...rows);
      });
    });
  }

  const figures = document.querySelectorAll("figure.chart");
  figures.forEach(show);
  document.body.classList.toggle("has-charts", figures.length > 0);
  document.querySelectorAll(".scroll table").forEach(sortable);
})();
