package org.pytorch.serve;

import io.netty.channel.Channel;
import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPromise;
import io.netty.channel.socket.DuplexChannel;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.handler.ssl.SslHandler;
import io.netty.util.ReferenceCountUtil;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.concurrent.TimeUnit;

/**
 * Lets in one request of a connection at a time, where a client sends the next before it has the answer to the last.
 *
 * <p>TorchServe works on all of them side by side and writes each answer when it is there; but a client takes the first
 * answer for that to its first request. What comes too early waits here, and the connection is not read meanwhile, so
 * it is no more than had arrived. Behind an answer that closes the connection nothing is let in any more.
 *
 * <p>One of these sits in the pipeline of each connection; so the handlers behind it know one request at most.
 */
final class InOrder extends ChannelDuplexHandler {
    private static final long LINGER_MS = 1000;

    // All used by the connection's own thread only.
    private final Deque<Object> held = new ArrayDeque<>();
    private boolean unanswered;
    private boolean closing;
    private boolean lingering;

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        if (closing) {
            ReferenceCountUtil.release(message);
        } else if (held.isEmpty() && !isTooEarly(ctx, message)) {
            letIn(ctx, message);
        } else {
            held.add(message);
            ctx.channel().config().setAutoRead(false);
        }
    }

    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        boolean interim = Exchanges.isInterim(message);
        ctx.write(message, promise); // first, as Exchanges may have it close the connection
        if (!interim && message instanceof HttpResponse && !HttpUtil.isKeepAlive((HttpResponse) message)) {
            closing = true;
            throwAway();
            ctx.channel().config().setAutoRead(true);
        }
        if (!interim && message instanceof LastHttpContent) {
            unanswered = false;
            letNextInSoon(ctx);
        }
    }

    @Override
    public void channelWritabilityChanged(ChannelHandlerContext ctx) {
        letNextInSoon(ctx);
        ctx.fireChannelWritabilityChanged();
    }

    /**
     * Behind an answer, says that nothing more comes, and closes once the client does, or does not in a while.
     *
     * <p>A connection that is closed with something unread is reset, and what the client has not read of its answers
     * yet is lost.
     */
    @Override
    public void close(ChannelHandlerContext ctx, ChannelPromise promise) {
        Channel channel = ctx.channel();
        boolean plain = channel instanceof DuplexChannel && ctx.pipeline().get(SslHandler.class) == null;
        if (!closing || !plain || !channel.isActive()) {
            ctx.close(promise);
            return;
        }
        channel.closeFuture().addListener(closed -> promise.trySuccess());
        if (lingering) {
            return;
        }
        lingering = true;
        ((DuplexChannel) channel).shutdownOutput();
        ctx.executor().schedule((Runnable) ctx::close, LINGER_MS, TimeUnit.MILLISECONDS);
    }

    @Override
    public void channelInactive(ChannelHandlerContext ctx) {
        closing = true;
        throwAway();
        ctx.fireChannelInactive();
    }

    /** Whether a request must wait: for the answer to the last one, or until the client has read earlier answers. */
    private boolean isTooEarly(ChannelHandlerContext ctx, Object message) {
        return message instanceof HttpRequest && (unanswered || !ctx.channel().isWritable());
    }

    private void letIn(ChannelHandlerContext ctx, Object message) {
        unanswered |= message instanceof HttpRequest;
        ctx.fireChannelRead(message);
    }

    private void letNextInSoon(ChannelHandlerContext ctx) {
        if (!held.isEmpty()) {
            // Not now: the answer that makes room is being written.
            ctx.executor().execute(() -> letNextIn(ctx));
        }
    }

    private void letNextIn(ChannelHandlerContext ctx) {
        if (held.isEmpty() || isTooEarly(ctx, held.peek())) {
            return;
        }
        while (!held.isEmpty() && !isTooEarly(ctx, held.peek())) {
            letIn(ctx, held.poll());
        }
        ctx.fireChannelReadComplete();
        if (held.isEmpty()) {
            ctx.channel().config().setAutoRead(true);
        }
    }

    private void throwAway() {
        held.forEach(ReferenceCountUtil::release);
        held.clear();
    }
}
