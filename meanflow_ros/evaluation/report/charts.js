// Small SVG charts. Values are numbers or null; null breaks a line.
const SVG = 'http://www.w3.org/2000/svg';
const finite = value => typeof value === 'number' && isFinite(value);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value);
  made.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== ''));
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function round(value, digits = 3) {
  if (!finite(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(digits - 1).replace('e+', 'e');
  return String(Number(value.toPrecision(digits)));
}

const percent = value => finite(value) ? (100 * value).toFixed(value && Math.abs(value) < 0.1 ? 1 : 0) + ' %' : '–';

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(each => each * power).find(each => each >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step)
    found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function span(series, floor) {
  const values = series.flat().filter(finite);
  let low = Math.min(...values), high = Math.max(...values);
  if (!values.length) [low, high] = [0, 1];
  if (floor !== undefined) low = Math.min(low, floor);
  if (high - low < 1e-12) { high += Math.abs(high) * 0.1 || 1; if (floor === undefined) low -= Math.abs(low) * 0.1 || 1; }
  const room = (high - low) * 0.06;
  return [floor !== undefined && low === floor ? low : low - room, high + room];
}

// A frame with axes; returns the svg and the functions from values to places.
function frame({width = 300, height = 180, x, y, label, left = 46, xName = '', yTicks = 4}) {
  const right = 8, top = 8, bottom = xName ? 33 : 22;
  const atX = value => left + (value - x[0]) / (x[1] - x[0]) * (width - left - right);
  const atY = value => height - bottom - (value - y[0]) / (y[1] - y[0]) * (height - top - bottom);
  const svg = shape('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label});
  for (const value of ticks(y[0], y[1], yTicks)) {
    svg.append(shape('line', {class: 'grid', x1: left, x2: width - right, y1: atY(value), y2: atY(value)}));
    svg.append(shape('text', {x: left - 5, y: atY(value) + 3.5, 'text-anchor': 'end'}, round(value)));
  }
  for (const value of ticks(x[0], x[1], width / 75))
    svg.append(shape('text', {x: atX(value), y: height - bottom + 14, 'text-anchor': 'middle'}, round(value)));
  svg.append(shape('line', {class: 'axis', x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}));
  if (xName) svg.append(shape('text', {x: (left + width - right) / 2, y: height - 3, 'text-anchor': 'middle'}, xName));
  return {svg, atX, atY, left, right, bottom, width, height};
}

function path(xs, ys, atX, atY) {
  let text = '', drawing = false;
  xs.forEach((x, index) => {
    const y = ys[index];
    if (!finite(y) || !finite(x)) { drawing = false; return; }
    text += `${drawing ? 'L' : 'M'}${atX(x).toFixed(1)} ${atY(y).toFixed(1)}`;
    drawing = true;
  });
  return text;
}

// lines: [{name, colour, values, dashed}]; all over the same xs.
function lineChart({xs, lines, label, xName, floor = 0, height}) {
  const drawn = frame({x: [xs[0], xs.length > 1 ? xs[xs.length - 1] : xs[0] + 1],
    y: span(lines.map(line => line.values), floor), label, xName, height});
  for (const line of lines.slice().reverse()) {
    drawn.svg.append(shape('path', {class: 'line', d: path(xs, line.values, drawn.atX, drawn.atY),
      stroke: line.colour, 'stroke-dasharray': line.dashed ? '4 3' : 'none',
      'stroke-width': line.dashed ? 1.4 : 2.4}, shape('title', {}, line.name)));
    if (xs.length === 1 && finite(line.values[0]))
      drawn.svg.append(shape('circle', {cx: drawn.atX(xs[0]), cy: drawn.atY(line.values[0]), r: 3, fill: line.colour}));
  }
  return drawn.svg;
}

function histogram({edges, counts, label, xName, colour = 'var(--policy)'}) {
  const drawn = frame({x: [edges[0], edges[edges.length - 1]], y: [0, Math.max(1, ...counts) * 1.05],
    label, xName, width: 420, yTicks: 3});
  counts.forEach((count, index) => {
    const from = drawn.atX(edges[index]), to = drawn.atX(edges[index + 1]);
    drawn.svg.append(shape('rect', {class: 'bar', x: from + 0.5, width: Math.max(0.8, to - from - 1), fill: colour,
      y: drawn.atY(count), height: Math.max(0, drawn.atY(0) - drawn.atY(count))},
      shape('title', {}, `${round(edges[index])} to ${round(edges[index + 1])}: ${count}`)));
  });
  return drawn.svg;
}

function scatter({points, label, xName}) {
  const drawn = frame({x: span([points.map(point => point[0])], 0), y: span([points.map(point => point[1])], 0),
    label, xName, width: 420});
  for (const [x, y] of points) if (finite(x) && finite(y))
    drawn.svg.append(shape('circle', {cx: drawn.atX(x), cy: drawn.atY(y), r: 2.6, fill: 'var(--policy)', opacity: 0.55}));
  return drawn.svg;
}

// rows: [{name, value, low, high, note}] as horizontal bars around zero.
function bars({rows, label, suffix = ''}) {
  const line = 27, names = 162, width = 480, height = rows.length * line + 24;
  const values = rows.flatMap(row => [row.value, row.low, row.high]).filter(finite);
  const range = span([[0, ...values]], undefined);
  const at = value => names + (value - range[0]) / (range[1] - range[0]) * (width - names - 84);
  const svg = shape('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label});
  rows.forEach((row, index) => {
    const y = index * line + 16;
    svg.append(shape('text', {x: names - 10, y: y + 4, 'text-anchor': 'end', style: 'font-size:12px;fill:var(--ink)'}, row.name));
    if (!finite(row.value)) { svg.append(shape('text', {x: names, y: y + 4}, row.note || 'not asked')); return; }
    svg.append(shape('rect', {class: 'bar', x: Math.min(at(0), at(row.value)), y: y - 7, height: 14, rx: 2,
      width: Math.max(1, Math.abs(at(row.value) - at(0))), fill: row.colour || 'var(--policy)'}));
    if (finite(row.low) && finite(row.high)) {
      svg.append(shape('line', {x1: at(row.low), x2: at(row.high), y1: y, y2: y, stroke: 'var(--ink)', 'stroke-width': 1.4}));
      for (const end of [row.low, row.high])
        svg.append(shape('line', {x1: at(end), x2: at(end), y1: y - 4, y2: y + 4, stroke: 'var(--ink)', 'stroke-width': 1.4}));
    }
    svg.append(shape('text', {x: at(Math.max(row.value, row.high ?? row.value, 0)) + 7, y: y + 4}, (row.text || round(row.value)) + suffix));
  });
  svg.append(shape('line', {class: 'axis', x1: at(0), x2: at(0), y1: 2, y2: height - 14}));
  return svg;
}
