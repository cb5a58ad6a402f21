package org.pytorch.serve;

import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.ReferenceCountUtil;
import java.util.ArrayDeque;
import java.util.Deque;

/**
 * Lets in one request of a connection at a time, where a client sends the next before it has the answer to the last.
 *
 * <p>TorchServe works on all of them side by side and writes each answer when it is there; but a client takes the first
 * answer for that to its first request. What comes too early waits here, and the connection is not read meanwhile, so
 * it is no more than had arrived.
 *
 * <p>One of these sits in the pipeline of each connection; so the handlers behind it know one request at most.
 */
final class InOrder extends ChannelDuplexHandler {
    // Both used by the connection's own thread only.
    private final Deque<Object> held = new ArrayDeque<>();
    private boolean unanswered;

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        if (held.isEmpty() && !isTooEarly(message)) {
            letIn(ctx, message);
            return;
        }
        held.add(message);
        ctx.channel().config().setAutoRead(false);
    }

    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        ctx.write(message, promise);
        if (!Exchanges.isInterim(message) && message instanceof LastHttpContent) {
            unanswered = false;
            if (!held.isEmpty()) {
                // Not now: the answer has yet to be flushed, and the connection may be closed behind it.
                ctx.executor().execute(() -> letNextIn(ctx));
            }
        }
    }

    @Override
    public void channelInactive(ChannelHandlerContext ctx) {
        held.forEach(ReferenceCountUtil::release);
        held.clear();
        ctx.fireChannelInactive();
    }

    private boolean isTooEarly(Object message) {
        return unanswered && message instanceof HttpRequest;
    }

    private void letIn(ChannelHandlerContext ctx, Object message) {
        unanswered |= message instanceof HttpRequest;
        ctx.fireChannelRead(message);
    }

    private void letNextIn(ChannelHandlerContext ctx) {
        if (held.isEmpty()) {
            return;
        }
        while (!held.isEmpty() && !isTooEarly(held.peek())) {
            letIn(ctx, held.poll());
        }
        ctx.fireChannelReadComplete();
        if (held.isEmpty()) {
            ctx.channel().config().setAutoRead(true);
        }
    }
}
