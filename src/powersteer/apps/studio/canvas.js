// A sheet to draw on. Its value is a PNG as a data URL: set here when a stroke ends, or by the server to show a drawing.
// It can be drawn on with mouse, finger or pen, and with the keyboard: arrows move, space lowers and lifts the pen.
const sheet = element.querySelector("canvas");
const context = sheet.getContext("2d", { willReadFrequently: true });
const button = (name) => element.querySelector(`[data-do="${name}"]`);
const width = element.querySelector('input[type="range"]');
const colour = element.querySelector('input[type="color"]');
const pointer = element.querySelector(".pointer");
const KEPT = 40; // strokes that can be undone
let undone = [], erasing = false, drawing = null, shown = null;
let at = [sheet.width / 2, sheet.height / 2], penDown = false;

const blank = () => {
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, sheet.width, sheet.height);
};
const remember = () => {
  undone.push(context.getImageData(0, 0, sheet.width, sheet.height));
  if (undone.length > KEPT) undone.shift();
};
const publish = () => {
  shown = sheet.toDataURL("image/png");
  props.value = shown;
  trigger("input");
};
const place = (event) => {
  const box = sheet.getBoundingClientRect();
  return [
    ((event.clientX - box.left) * sheet.width) / box.width,
    ((event.clientY - box.top) * sheet.height) / box.height,
  ];
};
const line = (from, to) => {
  context.strokeStyle = erasing ? "#ffffff" : colour.value;
  context.lineWidth = Number(width.value) * (erasing ? 2 : 1);
  context.lineCap = context.lineJoin = "round";
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
};
const choose = (eraser) => {
  erasing = eraser;
  button("pen").setAttribute("aria-pressed", String(!eraser));
  button("eraser").setAttribute("aria-pressed", String(eraser));
};
const undo = () => {
  if (!undone.length) return;
  context.putImageData(undone.pop(), 0, 0);
  publish();
};
const clear = () => {
  remember();
  blank();
  publish();
};

sheet.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  sheet.focus({ preventScroll: true });
  pointer.hidden = true;
  penDown = false;
  sheet.setPointerCapture(event.pointerId);
  remember();
  drawing = place(event);
  line(drawing, drawing);
});
sheet.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  for (const part of event.getCoalescedEvents?.() ?? [event]) {
    const to = place(part);
    line(drawing, to);
    drawing = to;
  }
});
const finish = () => {
  if (!drawing) return;
  drawing = null;
  publish();
};
sheet.addEventListener("pointerup", finish);
sheet.addEventListener("pointercancel", finish);

const showPointer = () => {
  pointer.hidden = false;
  pointer.classList.toggle("down", penDown);
  pointer.style.left = `${(100 * at[0]) / sheet.width}%`;
  pointer.style.top = `${(100 * at[1]) / sheet.height}%`;
};
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
sheet.addEventListener("keydown", (event) => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (event.key === " ") {
    penDown = !penDown;
    if (penDown) {
      remember();
      line(at, at);
    } else publish();
  } else if (MOVES[event.key]) {
    const step = event.shiftKey ? 32 : 8, [x, y] = MOVES[event.key];
    const to = [
      Math.min(sheet.width, Math.max(0, at[0] + x * step)),
      Math.min(sheet.height, Math.max(0, at[1] + y * step)),
    ];
    if (penDown) line(at, to);
    at = to;
  } else return;
  event.preventDefault();
  showPointer();
});
sheet.addEventListener("blur", () => {
  pointer.hidden = true;
  if (penDown) publish();
  penDown = false;
});

button("pen").addEventListener("click", () => choose(false));
button("eraser").addEventListener("click", () => choose(true));
button("undo").addEventListener("click", undo);
button("clear").addEventListener("click", clear);

const show = () => {
  if (!props.value || props.value === shown) return;
  shown = props.value;
  const picture = new Image();
  picture.onload = () => {
    remember();
    blank();
    context.drawImage(picture, 0, 0, sheet.width, sheet.height);
  };
  picture.src = shown;
};
watch("value", show);
blank();
show();
