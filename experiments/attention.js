// What each token attends to: a token that is pointed at, or reached by the keyboard, shades the others by
// its row of the weights; the maps are all of its rows.
const CELL = 18, SMALLEST = 3, WIDEST = 720, LABELLED = 12; // pixels
const FONT = "11px system-ui, sans-serif";

function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

class Attention {
  constructor(section) {
    this.section = section;
    this.bytes = decode(section.dataset.weights);
    this.heads = Number(section.dataset.heads);
    this.tokens = [...section.querySelectorAll(".tokens button")];
    this.told = section.querySelector(".told");
    this.maps = [...section.querySelectorAll("canvas")];
    this.row = null; // of the token that is shown
    for (const one of section.querySelectorAll("select, input")) one.addEventListener("change", () => this.choose());
    this.tokens.forEach((token, i) => {
      for (const kind of ["pointerenter", "focus", "click"]) token.addEventListener(kind, () => this.show(i));
    });
    for (const map of this.maps) map.addEventListener("pointermove", (event) => this.point(map, event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.choose();
  }

  // The weights [T, T] of the layer and head that are chosen, or the mean of the layer's heads.
  choose() {
    const [layer, head] = ["layer", "head"].map((name) => Number(this.section.querySelector(`.${name}`).value));
    const size = this.tokens.length ** 2, weights = new Float32Array(size);
    const chosen = head < 0 ? [...Array(this.heads).keys()] : [head];
    for (const one of chosen) {
      const start = (layer * this.heads + one) * size;
      for (let i = 0; i < size; i++) weights[i] += this.bytes[start + i] / 255 / chosen.length;
    }
    this.weights = weights;
    this.bare = this.section.querySelector(".bare").checked;
    this.draw();
    if (this.row !== null) this.show(this.row);
    else this.told.textContent = "Point at a token: the others are shaded by how much it attends to them.";
  }

  weight(i, j) {
    return this.weights[i * this.tokens.length + j];
  }

  // What is coloured: not what goes to [CLS] and [SEP], where they are left out.
  coloured(i, j) {
    return this.bare && "frame" in this.tokens[j].dataset ? 0 : this.weight(i, j);
  }

  name(i) {
    return `“${this.tokens[i].textContent}”`;
  }

  show(i) {
    this.row = i;
    const row = this.tokens.map((_, j) => this.coloured(i, j)), largest = Math.max(...row) || 1;
    this.tokens.forEach((token, j) => {
      token.style.setProperty("--shade", row[j] / largest);
      token.title = percent(this.weight(i, j));
      token.setAttribute("aria-pressed", String(i === j));
    });
    const most = row.map((_, j) => j).sort((a, b) => row[b] - row[a]).slice(0, 5);
    const list = most.map((j) => `${this.name(j)} ${percent(row[j])}`).join(", ");
    this.told.textContent = `${this.name(i)} attends to ${list}${row.length > 5 ? ", ..." : ""}`;
  }

  // The square of a map under the pointer.
  point(map, event) {
    const { rows, columns, cell, left, top } = this.layout(map);
    const i = rows[0] + Math.floor((event.offsetY - top) / cell);
    const j = columns[0] + Math.floor((event.offsetX - left) / cell);
    if (i < rows[0] || i >= rows[1] || j < columns[0] || j >= columns[1]) return;
    this.show(i);
    this.told.textContent = `${this.name(i)} attends to ${this.name(j)}: ${percent(this.weight(i, j))}`;
  }

  draw() {
    for (const map of this.maps) this.drawMap(map);
  }

  // Where in a map its squares lie; left and above there is room for the tokens' names, unless squares are small.
  layout(map) {
    const [rows, columns] = [map.dataset.rows, map.dataset.columns].map((text) => text.split(" ").map(Number));
    const [down, across] = [rows[1] - rows[0], columns[1] - columns[0]];
    const cell = Math.max(SMALLEST, Math.min(CELL, Math.floor(WIDEST / Math.max(down, across))));
    const pen = map.getContext("2d");
    pen.font = FONT;
    const width = (token) => pen.measureText(token.textContent).width;
    const room = ([first, end]) => 6 + Math.ceil(Math.max(...this.tokens.slice(first, end).map(width)));
    const [left, top] = cell < LABELLED ? [0, 0] : [room(rows), room(columns)];
    return { rows, columns, down, across, cell, left, top, pen };
  }

  // A square for each weight, darkest where it is the map's largest.
  drawMap(map) {
    const layout = this.layout(map), { rows, columns, down, across, cell, left, top, pen } = layout;
    const scale = devicePixelRatio || 1, [width, height] = [left + across * cell, top + down * cell];
    [map.width, map.height] = [width * scale, height * scale];
    [map.style.width, map.style.height] = [`${width}px`, `${height}px`];
    pen.scale(scale, scale);
    const squares = [];
    for (let i = 0; i < down; i++) {
      for (let j = 0; j < across; j++) squares.push([i, j, this.coloured(rows[0] + i, columns[0] + j)]);
    }
    const largest = squares.reduce((most, [, , share]) => Math.max(most, share), 0);
    map.closest("figure").querySelector(".darkest").textContent = `darkest: ${percent(largest)}`;
    const side = cell - (cell > 6), shaded = colour("--shaded");
    for (const [i, j, share] of squares) {
      pen.fillStyle = `rgba(${shaded}, ${0.04 + 0.96 * share / (largest || 1)})`;
      pen.fillRect(left + j * cell, top + i * cell, side, side);
    }
    if (left) this.drawNames(layout);
  }

  drawNames({ rows, columns, cell, left, top, pen }) {
    pen.font = FONT; // a canvas that is given a size forgets it
    pen.fillStyle = colour("--text");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    this.tokens.slice(...rows).forEach((token, i) => pen.fillText(token.textContent, left - 4, top + (i + 0.5) * cell));
    pen.textAlign = "left";
    this.tokens.slice(...columns).forEach((token, j) => {
      pen.save();
      pen.translate(left + (j + 0.5) * cell, top - 4);
      pen.rotate(-Math.PI / 2);
      pen.fillText(token.textContent, 0, 0);
      pen.restore();
    });
  }
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name);
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

for (const section of document.querySelectorAll("section.attention")) new Attention(section);
