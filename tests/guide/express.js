// The webhook guide's Express handler, its logic as it is printed there. What it does with an event is left out: it tells
// on standard output which event it took.
const express = require('express');
const crypto = require('crypto');

const app = express();
app.use(express.json());

// Verify webhook signature (optional but recommended)
function verifySignature(payload, signature, secret) {
  const expected = crypto
    .createHmac('sha256', secret)
    .update(JSON.stringify(payload))
    .digest('hex');

  return signature === expected;
}

app.post('/webhooks/trackpost', async (req, res) => {
  // Verify signature if using secret
  const signature = req.headers['x-trackpost-signature'];
  if (!verifySignature(req.body, signature, process.env.WEBHOOK_SECRET)) {
    return res.status(401).send('Invalid signature');
  }

  const event = req.body;

  try {
    console.log(event.id);

    // Always return 200 to acknowledge receipt
    res.status(200).send('OK');
  } catch (error) {
    console.error('Webhook error:', error);
    // Still return 200 to prevent retries
    res.status(200).send('OK');
  }
});

const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
