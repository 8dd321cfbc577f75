// Hosts the review on a page: gives review.js the `model` that a notebook would give it, on top of one WebSocket.
const FIRST_WAIT_MS = 300; // before the first attempt to reconnect; doubled up to
const LONGEST_WAIT_MS = 5000;

const line = document.getElementById("connection");
const say = (text) => { if (line.textContent !== text) line.textContent = text; };

function address() {
  const url = new URL("review/ws", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const reviewer = new URLSearchParams(location.search).get("reviewer");
  if (reviewer) url.searchParams.set("reviewer", reviewer);
  return url;
}

export class SocketModel {
  constructor(url, onFirstOpen) {
    this.url = url;
    this.onFirstOpen = onFirstOpen;
    this.listeners = new Set();
    this.opened = 0; // how often a connection was made
    this.wait = FIRST_WAIT_MS;
    this.connect();
    addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.retryNow(); });
  }

  on(event, listener) { if (event === "msg:custom") this.listeners.add(listener); }
  off(event, listener) { if (event === "msg:custom") this.listeners.delete(listener); }

  // What cannot be sent now is dropped: after a reconnect review.js says `ready` with everything that was not acknowledged,
  // and a second copy from here would only arrive beside it.
  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  emit(message, buffers = []) {
    for (const listener of [...this.listeners]) listener(message, buffers);
  }

  connect() {
    clearTimeout(this.timer);
    this.timer = null;
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    let message = null; // that waits for its buffers
    let buffers = [];
    socket.onopen = () => this.onOpen();
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") {
        message = JSON.parse(data);
        buffers = [];
      } else {
        buffers.push(new DataView(data));
      }
      if (message && buffers.length >= (message.buffers ?? 0)) {
        const whole = message;
        message = null;
        this.emit(whole, buffers);
      }
    };
    socket.onclose = ({ reason }) => this.onClose(reason);
    this.socket = socket;
  }

  onOpen() {
    this.wait = FIRST_WAIT_MS;
    this.opened += 1;
    say("");
    if (this.opened === 1) this.onFirstOpen();
    else this.emit({ type: "connection", state: "open" });
  }

  onClose(reason) {
    if (this.opened && this.wait === FIRST_WAIT_MS) this.emit({ type: "connection", state: "lost" });
    say(reason || "The connection is lost; trying again ...");
    this.timer = setTimeout(() => this.connect(), this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT_MS);
  }

  retryNow() {
    if (this.timer) this.connect();
  }
}

try {
  const review = (await import("./review.js")).default;
  const model = new SocketModel(address(), () => review.render({ model, el: document.getElementById("review") }));
} catch (error) {
  say(`The review could not be loaded: ${error.message}`);
  throw error;
}
