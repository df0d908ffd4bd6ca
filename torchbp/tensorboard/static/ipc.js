// TensorBoard's experimental plugin messages, in the few lines that a tab needs: `send` asks TensorBoard, `listen` hears it.
// send("experimental.GetRuns") gives run names; listen("experimental.DataReloaded", fn) hears the reload button.
const channel = new MessageChannel();
const port = channel.port1;
const waiting = new Map();
const listeners = new Map();
let next = 0;

port.addEventListener("message", async (event) => {
  const message = JSON.parse(event.data);
  if (message.isReply) {
    const { resolve, reject } = waiting.get(message.id) ?? {};
    waiting.delete(message.id);
    if (message.error) reject?.(new Error(message.error));
    else resolve?.(message.payload);
    return;
  }
  let payload = null;
  let error = null;
  try {
    payload = (await listeners.get(message.type)?.(message.payload)) ?? null;
  } catch (e) {
    error = String(e);
  }
  port.postMessage(
    JSON.stringify({ type: message.type, id: message.id, payload, error, isReply: true }),
  );
});
port.start();
if (window.parent !== window)
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);

export function send(type, payload = null) {
  return new Promise((resolve, reject) => {
    waiting.set(next, { resolve, reject });
    port.postMessage(JSON.stringify({ type, id: next++, payload, error: null, isReply: false }));
  });
}

export function listen(type, listener) {
  listeners.set(type, listener);
}
