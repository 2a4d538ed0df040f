// The webhook guide's AWS Lambda handler, its logic as it is printed there, behind a server that calls it as API Gateway
// does: the body as text, header names in lower case. It tells on standard output which event it took.
const crypto = require('crypto');

exports.handler = async (event) => {
  const body = JSON.parse(event.body);
  const signature = event.headers['x-trackpost-signature'];

  // Verify signature
  if (!verifySignature(body, signature, process.env.WEBHOOK_SECRET)) {
    return {
      statusCode: 401,
      body: 'Invalid signature'
    };
  }

  // Process webhook
  await processWebhook(body);

  return {
    statusCode: 200,
    body: 'OK'
  };
};

function verifySignature(payload, signature, secret) {
  const expected = crypto
    .createHmac('sha256', secret)
    .update(JSON.stringify(payload))
    .digest('hex');

  return signature === expected;
}

async function processWebhook(event) {
  console.log(event.id);
}

const server = require('http').createServer(async (req, res) => {
  const blocks = [];
  for await (const block of req) blocks.push(block);
  const answer = await exports.handler({ body: Buffer.concat(blocks).toString('utf8'), headers: req.headers });
  res.writeHead(answer.statusCode).end(answer.body);
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
