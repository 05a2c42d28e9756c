// Recorded and executed actions of one episode, with the pictures under the cursor.
class Timeline {
  constructor(data, root) {
    this.data = data;
    this.robot = data.document.policy;
    this.select = element('select', {'aria-label': 'Episode', onchange: () => this.show(this.select.selectedIndex)},
      data.episodes.map(each => element('option', {}, `${each.name}${each.instruction ? ` – “${each.instruction}”` : ''} (error ${round(each.relative_error, 2)})`)));
    this.plots = element('div', {class: 'plots wide timeline', tabindex: 0, role: 'slider', 'aria-label': 'Time in the episode'});
    this.pictures = element('div', {class: 'cameras'});
    this.text = element('p', {class: 'now soft', 'aria-live': 'off'});
    root.append(
      element('div', {class: 'bar-row'}, this.select,
        element('button', {type: 'button', onclick: () => this.step(-1)}, '← step'),
        element('button', {type: 'button', onclick: () => this.step(1)}, 'step →'),
        element('button', {type: 'button', onclick: () => this.jumpToWorst()}, 'worst step')),
      element('p', {class: 'note keys'}, element('kbd', {}, '←'), ' ', element('kbd', {}, '→'), ' one step, with ', element('kbd', {}, 'Shift'),
        ' ten; ', element('kbd', {}, 'Home'), ' ', element('kbd', {}, 'End'), '; ', element('kbd', {}, 'PageUp'), ' ', element('kbd', {}, 'PageDown'), ' another episode'),
      this.pictures, this.text, this.plots);
    this.plots.addEventListener('keydown', event => this.key(event));
    for (const kind of ['pointermove', 'pointerdown'])
      this.plots.addEventListener(kind, event => this.point(event));
    this.show(0);
  }

  show(number, at) {
    this.number = Math.min(Math.max(number, 0), this.data.episodes.length - 1);
    this.select.selectedIndex = this.number;
    const episode = this.episode = this.data.episodes[this.number];
    this.cursors = [];
    this.pictures.replaceChildren(...Object.keys(episode.frames.cameras).map(name =>
      element('figure', {}, element('img', {alt: `camera ${name}`, 'data-camera': name}), element('figcaption', {}, name))));
    this.plots.replaceChildren(...this.robot.dimensions.map((name, index) => this.plot(name, index)));
    this.plots.setAttribute('aria-valuemin', 0);
    this.plots.setAttribute('aria-valuemax', episode.t.length - 1);
    this.move(at ?? 0);
  }

  plot(name, index) {
    const {t, executed, expected, marks, frames} = this.episode;
    const drawn = frame({x: [t[0], Math.max(t[t.length - 1], t[0] + 1e-3)],
      y: span([executed[index], expected[index], frames.chunks.flatMap(chunk => chunk.map(step => step[index]))]),
      label: `${name}: recorded and executed`, xName: 'seconds', width: 340, height: 160});
    const marked = (wanted, colour, what) => {
      const width = Math.max(1.2, (drawn.width - drawn.left - drawn.right) / t.length);
      let text = '';
      [...marks].forEach((mark, at) => { if (mark === wanted) text += `M${drawn.atX(t[at]).toFixed(1)} 8v${drawn.height - drawn.bottom - 8}`; });
      if (text) drawn.svg.append(shape('path', {d: text, stroke: colour, 'stroke-width': width, opacity: 0.22}, shape('title', {}, what)));
    };
    marked('m', 'var(--stop)', 'no action was due');
    drawn.svg.append(
      shape('path', {class: 'line', d: path(t, expected[index], drawn.atX, drawn.atY), stroke: 'var(--recorded)', 'stroke-width': 1.3}),
      shape('path', {class: 'line', d: path(t, executed[index], drawn.atX, drawn.atY), stroke: 'var(--policy)', 'stroke-width': 1.9}));
    const chunk = shape('path', {class: 'line', stroke: 'var(--a)', 'stroke-dasharray': '3 2', d: ''});
    const cursor = shape('line', {y1: 4, y2: drawn.height - drawn.bottom, stroke: 'var(--ink)', 'stroke-width': 1});
    const dot = shape('circle', {r: 3, fill: 'var(--policy)'});
    drawn.svg.append(chunk, cursor, dot);
    this.cursors.push({...drawn, cursor, chunk, dot, index});
    const value = element('span', {});
    this.cursors[index].value = value;
    return element('figure', {}, element('figcaption', {}, element('b', {}, name), ` ${unitText(this.robot.units[name])} `, value), drawn.svg);
  }

  move(at) {
    const {t, executed, expected, marks, frames} = this.episode;
    this.at = Math.min(Math.max(at, 0), t.length - 1);
    const now = t[this.at], row = lastAtMost(frames.t, now);
    for (const each of this.cursors) {
      const x = each.atX(now), mine = executed[each.index][this.at], theirs = expected[each.index][this.at];
      each.cursor.setAttribute('x1', x); each.cursor.setAttribute('x2', x);
      each.dot.setAttribute('visibility', finite(mine) ? 'visible' : 'hidden');
      if (finite(mine)) { each.dot.setAttribute('cx', x); each.dot.setAttribute('cy', each.atY(mine)); }
      each.value.textContent = finite(mine) ? `${round(mine)}, recorded ${round(theirs)}` : 'nothing due';
      const steps = frames.chunks[row] || [];
      each.chunk.setAttribute('d', path(steps.map((_, step) => frames.t[row] + (this.robot.first_step + step) * this.robot.period_s),
        steps.map(step => step[each.index]), value => Math.min(each.atX(value), each.width - each.right), each.atY));
    }
    for (const image of this.pictures.querySelectorAll('img')) {
      const media = frames.cameras[image.dataset.camera][Math.max(row, 0)];
      if (media !== undefined) image.src = 'data:image/jpeg;base64,' + this.data.media[media];
    }
    const what = {m: 'no action was due', s: 'a newer observation had been taken', '-': 'before the first action'}[marks[this.at]];
    this.text.textContent = `${now.toFixed(2)} s of ${t[t.length - 1].toFixed(2)} s`
      + (row >= 0 ? `; pictures and orange chunk of ${frames.t[row].toFixed(2)} s` : '') + (what ? `; ${what}` : '');
    this.plots.setAttribute('aria-valuenow', this.at);
    this.plots.setAttribute('aria-valuetext', `${now.toFixed(2)} seconds`);
  }

  step(by) { this.move(this.at + by); }

  jumpToWorst() { this.move(this.episode.worst); this.plots.focus({preventScroll: true}); }

  key(event) {
    const by = event.shiftKey ? 10 : 1;
    const action = {ArrowRight: () => this.step(by), ArrowLeft: () => this.step(-by), Home: () => this.move(0),
      End: () => this.move(this.episode.t.length - 1), PageDown: () => this.show(this.number + 1), PageUp: () => this.show(this.number - 1)}[event.key];
    if (action) { action(); event.preventDefault(); }
  }

  point(event) {
    const svg = event.target.closest('svg');
    if (!svg || (event.type === 'pointermove' && event.pointerType === 'touch' && !event.buttons)) return;
    const box = svg.getBoundingClientRect(), {t} = this.episode, drawn = this.cursors[0];
    const place = (event.clientX - box.left) / box.width * drawn.width;
    const share = (place - drawn.left) / (drawn.width - drawn.left - drawn.right);
    this.move(nearest(t, t[0] + share * (t[t.length - 1] - t[0])));
  }
}

function lastAtMost(values, limit) {
  let found = -1;
  values.forEach((value, index) => { if (value <= limit + 1e-9) found = index; });
  return found;
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, index) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = index; });
  return best;
}

const unitText = unit => !unit || unit === '1' ? '' : unit;
