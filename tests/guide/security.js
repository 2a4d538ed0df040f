// The guide's other verification, of its section on security: the comparison in constant time. Served as the Lambda is.
const crypto = require('crypto');

function verifyWebhook(body, signature, secret) {
  const expected = crypto
    .createHmac('sha256', secret)
    .update(JSON.stringify(body))
    .digest('hex');

  return crypto.timingSafeEqual(
    Buffer.from(signature),
    Buffer.from(expected)
  );
}

const server = require('http').createServer(async (req, res) => {
  const blocks = [];
  for await (const block of req) blocks.push(block);
  const body = JSON.parse(Buffer.concat(blocks).toString('utf8'));
  const genuine = verifyWebhook(body, req.headers['x-trackpost-signature'], process.env.WEBHOOK_SECRET);
  if (genuine) console.log(body.id);
  res.writeHead(genuine ? 200 : 401).end();
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
