// TensorBoard's experimental plugin messages, as far as the tab needs them: it listens, and answers.

const listeners = new Map();

/** Calls `listener` on a message of TensorBoard's, e.g. "experimental.DataReloaded". */
export function listen(type, listener) {
  listeners.set(type, listener);
}

const { port1: port, port2: theirs } = new MessageChannel();

port.addEventListener("message", async (event) => {
  const { type, id, payload, isReply } = JSON.parse(event.data);
  if (isReply) return;
  const answer = { type, id, payload: null, error: null, isReply: true };
  try {
    answer.payload = (await listeners.get(type)?.(payload)) ?? null;
  } catch (error) {
    answer.error = String(error);
  }
  port.postMessage(JSON.stringify(answer));
});
port.start();
window.parent.postMessage("experimental.bootstrap", "*", [theirs]);
