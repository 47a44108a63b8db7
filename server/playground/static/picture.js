// A text with its colours as an SVG picture that stands alone: rectangles, marks beneath, and a legend.

import { classOf, labelsOf, MEASURES } from "./colours.js";
import { make, svg } from "./dom.js";

const COLUMNS = 84, WIDE = 9, HIGH = 27, EDGE = 20;

// The colours of a class, as the page has them now.
function paint(name) {
  const probe = make("span", { class: `tok ${name}`, text: "x" });
  document.querySelector(".text").append(probe);
  const { backgroundColor, borderBottomColor, borderBottomWidth, borderBottomStyle } = getComputedStyle(probe);
  probe.remove();
  return { fill: backgroundColor, mark: borderBottomColor, width: Number.parseFloat(borderBottomWidth), style: borderBottomStyle };
}

const DASHES = { dashed: "5 3", dotted: "1.5 3" };

function token(text, x, y, look) {
  const width = [...text].length * WIDE;
  const parts = [svg("rect", { x, y, width, height: HIGH - 6, fill: look.fill })];
  if (look.width) parts.push(svg("line", { x1: x + 0.5, x2: x + width - 0.5, y1: y + HIGH - 6, y2: y + HIGH - 6, stroke: look.mark, "stroke-width": look.width, "stroke-dasharray": DASHES[look.style] ?? "none" }));
  parts.push(svg("text", { x, y: y + 15, textLength: width, lengthAdjust: "spacingAndGlyphs", "xml:space": "preserve", text }));
  return parts;
}

export function picture({ title, records, members, measure }) {
  const looks = new Map();
  const look = (name) => looks.get(name) ?? (looks.set(name, paint(name)), looks.get(name));
  const page = getComputedStyle(document.querySelector(".text"));
  const shapes = [];
  let column = 0, row = 2;
  for (const record of records) {
    for (const piece of record.text.split(/(\n)/)) {
      if (piece === "\n" || column + [...piece].length > COLUMNS) [column, row] = [0, row + 1];
      if (piece === "\n" || piece === "") continue;
      shapes.push(...token(piece, EDGE + column * WIDE, EDGE + row * HIGH, look(classOf(measure, record.trace, members).replace("tok", "").trim())));
      column += [...piece].length;
    }
  }
  row += 2;
  column = 0;
  labelsOf(measure, members).forEach((label, rank) => {
    if (column + label.length + 7 > COLUMNS) [column, row] = [0, row + 1];
    shapes.push(...token("abc", EDGE + column * WIDE, EDGE + row * HIGH, look(`${MEASURES[measure].kind}${rank % 6}`)), svg("text", { x: EDGE + (column + 4) * WIDE, y: EDGE + row * HIGH + 15, class: "label", text: label }));
    column += label.length + 7;
  });
  const width = 2 * EDGE + COLUMNS * WIDE, height = 2 * EDGE + (row + 1) * HIGH;
  const style = svg("style", { text: `text{font:15px ui-monospace,"DejaVu Sans Mono",Menlo,monospace;fill:${page.color}}.title{font-weight:700}` });
  const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height }, svg("title", { text: title }), style,
    svg("rect", { width, height, fill: page.backgroundColor }), svg("text", { x: EDGE, y: EDGE + 18, class: "title", text: title }), ...shapes);
  return new XMLSerializer().serializeToString(root);
}
